"""`serac serve --lanes --workers` as a person starts it: processes, a client, and clocks for what befalls them."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from engine.errors import ResourceExhausted
from engine.serve.client import Client

FLAGS = ("--numerics=invariant", "--max-num-batched-tokens=16", "--max-model-len=256", "--device=cpu")
REFUSED_S = 60.0
ALONE = """
import json, sys
from engine.llm import LLM
rows, asked = json.loads(sys.stdin.read())
llm = LLM(mesh="tp=1", numerics="invariant", max_num_batched_tokens=16, max_model_len=256, max_num_seqs=rows)
print(json.dumps([llm.generate(prompt, **options)[0].token_ids for prompt, options in asked]))
"""


def environment() -> dict[str, str]:
    """That of a person, who sees as many devices as are asked for."""
    return {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}


def alone(rows: int, asked: list[tuple[str, dict]]) -> list[list[int]]:
    """The tokens of one lane on one device, in a process that shares the compiled programs of such a worker."""
    done = subprocess.run(
        [sys.executable, "-c", ALONE],
        input=json.dumps([rows, asked]),
        capture_output=True,
        text=True,
        env=environment(),
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


class Served:
    """The embedded model on `lanes`, each in a process of its own with `rows` sequences side by side."""

    def __init__(self, lanes: str, rows: int, log: Path, *more: str):
        command = [sys.executable, "-m", "engine.cli", "serve", "embedded", f"--lanes={lanes}", "--workers"]
        with log.open("w") as errors:
            self.front = subprocess.Popen(
                [*command, *FLAGS, *more, f"--max-num-seqs={rows}", "--port=0", "--admin-port=0"],
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment(),
            )
        self.ready = json.loads(self.front.stdout.readline() or "{}")
        assert self.ready.get("event") == "ready", log.read_text()[-2000:]
        self.client = Client(self.ready["grpc"], admin=self.ready["admin"])

    def workers(self) -> dict[str, int]:
        """Process ids by slot, those of a lane's other processes by slot/rank."""
        found = {}
        for tasks in Path(f"/proc/{self.front.pid}/task").glob("*/children"):
            for pid in tasks.read_text().split():
                with contextlib.suppress(OSError):
                    words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
                    said = dict(word.split("=", 1) for word in words if word.startswith(("--lane=", "--rank=")))
                    if said:
                        rank = said.get("--rank", "0")
                        found[said["--lane"] + f"/{rank}" * (rank != "0")] = int(pid)
        return found

    def kill(self, worker: str, how: signal.Signals = signal.SIGKILL) -> float:
        """Kill -9, or another signal; when."""
        os.kill(self.workers()[worker], how)
        return time.monotonic()

    def lane(self, slot: str):
        """What the server says of it."""
        return next(lane for lane in self.client.lanes() if lane.name.split(".")[0] == slot)

    def restored(self) -> bool:
        load = self.client.load()
        return load["blocks_available"] == load["blocks"] and not load["waiting"] and not load["in_flight_steps"]

    def wait(self, what, seconds: float) -> float:
        """Until `what()`; when that was. Fails when it takes longer than `seconds`."""
        began = time.monotonic()
        while not what():
            assert time.monotonic() - began < seconds, f"not within {seconds} s"
            time.sleep(0.01)
        return time.monotonic()

    def close(self) -> int:
        """SIGTERM; the exit code."""
        self.front.send_signal(signal.SIGTERM)
        try:
            return self.front.wait(60)
        finally:
            self.client.close()
            self.front.kill()
            self.front.stdout.close()


class Asked:
    """A stream read on a thread of its own: its tokens and when each came."""

    def __init__(self, served: Served, prompt: str, **parameters):
        self.tokens: list[int] = []
        self.times: list[float] = []
        self.error: Exception | None = None
        self._call = served.client.stream, prompt, parameters
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        until = time.monotonic() + REFUSED_S
        while not self.tokens and self.error is None and time.monotonic() < until:
            try:
                self._take()
            except ResourceExhausted:  # too many wait; it says to come again
                time.sleep(0.1)
            except Exception as error:  # told by `result`
                self.error = error

    def _take(self) -> None:
        stream, prompt, parameters = self._call
        for part in stream(prompt, **parameters):
            for choice in part.choices:
                self.tokens += choice.token_ids
                self.times += [time.monotonic()] * len(choice.token_ids)

    def result(self, seconds: float = 120.0) -> list[int]:
        self._thread.join(seconds)
        assert not self._thread.is_alive() and self.error is None, self.error
        return self.tokens
