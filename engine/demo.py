"""`serac demo`: the whole path on this machine in a minute.

    a child `serac serve embedded` on free ports -> a streamed answer, two answers side by side, a chat -> drained

The child runs on the GPUs that are there, else on 8 virtual CPU devices: a mesh of the same programs.
"""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TextIO

from engine.environment import gpu_problem
from engine.errors import SeracError, Unavailable
from engine.serve.calls import Reply
from engine.serve.client import Client

MESH = "tp=8"
FEW_PROGRAMS = ("--max-num-seqs", "2", "--max-num-batched-tokens", "64")  # a demo should not compile for long
STREAMED = "def read_lines(path):"
SIDE_BY_SIDE = ("import os\n\n\ndef ", "class Stack:\n    def __init__(self):\n")
SEED = 7
QUESTION = "Write a function that adds two numbers."
NEXT_STEPS = """
Next:
  serac serve MODEL --mesh tp=8          a folder or a cached ORG/NAME; `serac serve --help` for the rest
  serac generate 'def add(a, b):'        against a running server
  serac chat                             a conversation
  python -m bench mesh --meshes 1,2,4,8  measure it over mesh sizes
  from engine.serve.client import Client   the same from Python"""


def command() -> list[str]:
    """The server of the demo."""
    mesh = MESH if gpu_problem() is not None else "auto"
    flags = ("--mesh", mesh, "--port", "0", "--admin-port", "0", "--log-level", "warning", *FEW_PROGRAMS)
    return [sys.executable, "-m", "engine.cli", "serve", "embedded", *flags]


def run(out: TextIO, server: Sequence[str] | None = None) -> int:
    """Start `server`, ask it, print, drain it; 0 when all of it worked."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the child is ended too
    server = command() if server is None else server
    print(f"Starting: serac {' '.join(server[3:])}", file=out, flush=True)
    with served(server) as facts, Client(str(facts["grpc"])) as client:
        print(f"Ready: {facts['title']}, lanes {facts.get('lanes')}, gRPC on {facts['grpc']}", file=out)
        show_stream(client, out)
        show_pair(client, out)
        show_chat(client, out)
    print("\nThe server drained and left.", file=out)
    print(NEXT_STEPS, file=out, flush=True)
    return 0


@contextmanager
def served(server: Sequence[str]) -> Iterator[Mapping[str, object]]:
    """A server in a child process, drained at the end; yields its banner."""
    child = subprocess.Popen(server, stdout=subprocess.PIPE, text=True)
    try:
        yield _banner(child)
        child.send_signal(signal.SIGTERM)
        if child.wait(timeout=60) != 0:
            raise SeracError(f"server: ended with code {child.returncode}; expected 0")
    finally:
        if child.poll() is None:
            child.kill()
            child.wait()
        child.stdout.close()


def _banner(child: subprocess.Popen) -> Mapping[str, object]:
    for line in child.stdout:
        if line.startswith("{"):
            facts = json.loads(line)
            if facts.get("event") == "ready":
                return facts
    raise Unavailable(f"server: ended with code {child.wait()} before it was ready")


def show_stream(client: Client, out: TextIO) -> None:
    """One answer, written as it comes."""
    print(f"\n--- Generate, streamed, seed {SEED}\n{STREAMED}", end="", file=out, flush=True)
    last: Reply | None = None
    for last in client.stream(STREAMED, seed=SEED, max_tokens=64):
        print(last.text, end="", file=out, flush=True)
    if last is not None and last.choices:
        choice = last.choices[-1]
        tokens = choice.usage.completion_tokens if choice.usage else "?"
        print(f"\n[{choice.finish_reason}, {tokens} tokens, revision {last.revision}]", file=out)


def show_pair(client: Client, out: TextIO) -> None:
    """Two answers that share the steps of the server."""
    with ThreadPoolExecutor(len(SIDE_BY_SIDE)) as pool:
        ask = [pool.submit(client.generate, prompt, seed=SEED, max_tokens=48) for prompt in SIDE_BY_SIDE]
        for k, (prompt, reply) in enumerate(zip(SIDE_BY_SIDE, ask, strict=True), 1):
            print(
                f"\n--- GenerateUnary, {k} of {len(ask)} at once, seed {SEED}\n{prompt}{reply.result().text}",
                file=out,
            )


def show_chat(client: Client, out: TextIO) -> None:
    """A chat under the model's own template."""
    reply = client.chat([{"role": "user", "content": QUESTION}], seed=SEED, max_tokens=64)
    print(f"\n--- Chat\nuser: {QUESTION}\nassistant: {reply.text}", file=out, flush=True)
