"""The doctor's hand on a host: a process that answers questions, one JSON line each, until its input ends.

    {"ask": "facts", "address", "cache", "ports"}        -> {"facts": {...}}
    {"ask": "clock"}                                     -> {"now": seconds}
    {"ask": "listen", "address", "port"}                 -> {"port": N} | {"problem": why}; until the end
    {"ask": "reach", "addresses": {name: [host, port]}}  -> {"reached": {name: seconds | null}}
    {"ask": "allreduce", "words", "environment"}         -> what the child says, {"done": code, "problem": why}

It runs as `python -m engine.cluster.examine` at the end of a pipe or of ssh, never imports jax, and starts one
child that does. It ends with its input, and in any case after LIFE_S: nothing stays on a host that lost its doctor.
"""

import contextlib
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import IO

from engine.cluster.facts import gather, reach

LIFE_S = 240
REACH_S = 3.0
MOST_AT_ONCE = 64
CHILD = ("-m", "engine.allreduce")


class Examiner:
    """Answers on `out`."""

    def __init__(self, out: IO[str]):
        self._out = out
        self._listeners: list[socket.socket] = []
        self._child: subprocess.Popen[str] | None = None
        self._closed = False
        self.asks = {
            "facts": self.facts,
            "clock": lambda words: {"now": time.time()},
            "listen": self.listen,
            "reach": self.reach,
            "allreduce": self.allreduce,
        }

    def answer(self, line: str) -> None:
        """One question."""
        words = json.loads(line)
        self.say(self.asks[words["ask"]](words))

    def say(self, words: Mapping[str, object]) -> None:
        print(json.dumps(words), file=self._out, flush=True)

    def facts(self, words: Mapping) -> dict[str, object]:
        """What this host says of itself."""
        cache = Path(words["cache"]) if words["cache"] else None
        ports = {name: (host, port) for name, (host, port) in words["ports"].items()}
        return {"facts": asdict(gather(words["address"], cache, ports))}

    def listen(self, words: Mapping) -> dict[str, object]:
        """Accept connections at an address of this host; port 0 takes a free one."""
        try:
            listener = socket.create_server((words["address"], words["port"]), backlog=MOST_AT_ONCE)
        except OSError as error:
            return {"problem": error.strerror}
        self._listeners.append(listener)
        return {"port": listener.getsockname()[1]}

    def reach(self, words: Mapping) -> dict[str, object]:
        """Connect to others, all at once."""
        with ThreadPoolExecutor(MOST_AT_ONCE) as pool:
            ask = [pool.submit(reach, {name: where}, REACH_S) for name, where in words["addresses"].items()]
            return {"reached": {name: took for each in ask for name, took in each.result().items()}}

    def allreduce(self, words: Mapping) -> dict[str, object]:
        """Run the child to its end, passing on what it says."""
        self.close_listeners()  # the coordinator takes a port of theirs
        child = self._child = subprocess.Popen(
            [sys.executable, *CHILD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **words["environment"]},
        )
        assert child.stdin is not None and child.stdout is not None and child.stderr is not None
        last: deque[str] = deque(maxlen=1)
        if self._closed:  # the input ended meanwhile
            child.kill()
        said = (line for line in child.stderr if line.strip())
        errors = threading.Thread(target=last.extend, args=(said,), daemon=True)
        errors.start()
        with contextlib.suppress(BrokenPipeError):  # as its code will tell
            print(json.dumps(words["words"]), file=child.stdin, flush=True)
        for line in child.stdout:
            if line.startswith("{"):
                self.say(json.loads(line))
        code = child.wait()
        errors.join(1)
        return {"done": code, "problem": last[0].strip() if code and last else ""}

    def close_listeners(self) -> None:
        while self._listeners:
            self._listeners.pop().close()

    def close(self) -> None:
        """Leave nothing behind."""
        self._closed = True
        self.close_listeners()
        if self._child is not None:
            self._child.kill()


def main(source: IO[str], out: IO[str]) -> None:
    """Answer until the input ends."""
    signal.alarm(LIFE_S)
    examiner = Examiner(out)
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()

    def listen() -> None:  # also while a child runs
        for line in source:
            lines.put(line)
        examiner.close()
        lines.put("")

    threading.Thread(target=listen, daemon=True).start()
    with contextlib.suppress(BrokenPipeError):
        while line := lines.get():
            examiner.answer(line)


if __name__ == "__main__":
    main(sys.stdin, sys.stdout)
