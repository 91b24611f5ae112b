"""Replicas as a person starts them, a gateway in front, and a client that knows only the gateway."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

FLAGS = ("--device=cpu", "--numerics=invariant", "--max-num-seqs=4", "--max-num-batched-tokens=16")
SIZES = ("--max-model-len=256", "--port=0", "--admin-port=0")
START_S = 300.0
CLIENT = """
import json, sys, threading, openai
address, asked = json.loads(sys.stdin.readline())
client = openai.OpenAI(base_url=address, api_key="none", max_retries=0, timeout=60)
def ask(k, kind, options):
    told, seen = False, ""
    try:
        make = client.completions if kind == "completion" else client.chat.completions
        for event in make.create(model="embedded", stream=True, **options):
            for choice in event.choices:
                seen += (choice.text if kind == "completion" else choice.delta.content) or ""
            if seen and not told:
                told = True
                print(json.dumps([k, "began", ""]), flush=True)
        print(json.dumps([k, "ended", seen]), flush=True)
    except openai.APIError as error:
        print(json.dumps([k, "failed", str(error)]), flush=True)
threads = [threading.Thread(target=ask, args=(k, *each)) for k, each in enumerate(asked)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""


def environment() -> dict[str, str]:
    """That of a person, who sees as many devices as are asked for."""
    return {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}


def free_port() -> int:
    """One that nobody holds now."""
    with socket.create_server(("127.0.0.1", 0)) as holder:
        return holder.getsockname()[1]


class Process:
    """A process that is gone when the test is."""

    def __init__(
        self,
        command: list[str],
        log: Path,
        out: int | None = subprocess.DEVNULL,
        given: Mapping[str, str] = MappingProxyType({}),
    ):
        self.log, seen = log, environment() | given
        with log.open("w") as errors:
            self.running = subprocess.Popen(
                command, stdout=out or errors, stderr=errors, stdin=subprocess.DEVNULL, text=True, env=seen
            )

    def kill(self) -> float:
        """kill -9; when."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.running.pid, signal.SIGKILL)
        self.running.wait()
        if self.running.stdout is not None:
            self.running.stdout.close()
        return time.monotonic()


class Replica(Process):
    """`serac serve embedded` on free ports; `address` once it is `up`. With `secret` its lane may have partners."""

    def __init__(self, log: Path, *more: str, secret: str = ""):
        command = [sys.executable, "-m", "engine.cli", "serve", "embedded", *FLAGS, *SIZES]
        lanes = ["--lanes=both:tp=1", "--workers"] if secret else ["--mesh=tp=1"]
        given = {"SERAC_CLUSTER_SECRET": secret} if secret else {}
        super().__init__([*command, "--worker-api=vllm", *lanes, *more], log, subprocess.PIPE, given)
        self.address = self.admin = ""

    def up(self) -> "Replica":
        """Wait until it serves."""
        ready = json.loads(self.running.stdout.readline() or "{}")
        assert ready.get("event") == "ready", self.log.read_text()[-2000:]
        self.address, self.admin = ready["grpc"], ready["admin"]
        return self

    def served(self) -> int:
        """How many requests its log tells of."""
        return self.log.read_text().count('"message": "request"')


class Smg(Process):
    """The gateway; `api` is where clients go."""

    def __init__(self, programs: Path, log: Path, *arguments: str):
        port = free_port()
        self.place = f"http://127.0.0.1:{port}"
        self.api = f"{self.place}/v1"
        ports = ["--port", str(port), "--prometheus-port", str(free_port())]
        checks = ["--health-check-interval-secs", "1", "--worker-startup-check-interval", "1"]
        command = [str(programs / "smg"), "launch", "--host", "127.0.0.1", *ports, *checks, *arguments]
        super().__init__(command, log, None)

    def workers(self) -> dict[str, dict]:
        """What it says of each, by address."""
        try:
            with urllib.request.urlopen(f"{self.place}/workers", timeout=5) as answer:
                told = json.loads(answer.read())["workers"]
        except (urllib.error.URLError, OSError):
            return {}
        return {worker["url"].removeprefix("grpc://").removeprefix("grpcs://"): worker for worker in told}

    def wait(self, healthy: int, within_s: float = 60.0) -> None:
        """Until so many workers are healthy."""
        until = time.monotonic() + within_s
        while sum(worker["is_healthy"] for worker in self.workers().values()) != healthy:
            assert time.monotonic() < until and self.running.poll() is None, self.log.read_text()[-3000:]
            time.sleep(0.1)


class Clients:
    """Streams side by side through the `openai` package: (kind, options) each."""

    def __init__(self, programs: Path, api: str, asked: list[tuple[str, dict]]):
        command = [str(programs / "python"), "-c", CLIENT]
        self._running = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._running.stdin.write(json.dumps([api, asked]) + "\n")
        self._running.stdin.close()
        self._count = len(asked)
        self.said: list[tuple[int, str, str]] = []

    def hear(self, count: int, what: str) -> None:
        """Read on until so many streams said `what`."""
        while sum(word == what for _, word, _ in self.said) < count:
            self.said.append(tuple(json.loads(self._running.stdout.readline())))

    def end(self) -> list[tuple[str, str]]:
        """(ended or failed, text or reason) of each."""
        self.said += [tuple(json.loads(line)) for line in self._running.stdout]
        self._running.stdout.close()
        assert self._running.wait(60) == 0
        last = {k: (word, text) for k, word, text in self.said if word != "began"}
        return [last[k] for k in range(self._count)]
