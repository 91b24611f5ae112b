"""Starts the worker processes of one machine, hears of each line they print, and starts them again.

    start --> STARTING --"ready"--> READY --exit--> waits (doubling) --> STARTING
              STARTING, READY --exit with a configuration error (2), or too many starts--> given up

A worker prints one JSON object a line: {"event": "ready", ...facts} once, {"event": "life", "name": ...} whenever
its lane has a new name. It reads one JSON line, which says how to join, and ends when its input ends: so it dies
with whoever started it. Costs a thread or two a worker.
"""

import json
import logging
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import IO

from engine.errors import ConfigError

FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 30.0
STEADY_S = 60.0  # a worker that lived so long starts with a fresh count
MOST_STARTS = 6
STOP_S = 10.0
CONFIGURATION = 2
ERROR = "serac: error: "

logger = logging.getLogger("serac.supervisor")


@dataclass(frozen=True, slots=True)
class Command:
    """How to start a worker."""

    arguments: Sequence[str]
    environment: Mapping[str, str]


class Worker:
    """One slot: a process, and the one after it."""

    def __init__(self, slot: str, command: Command, told: Callable[[str, dict], None]):
        self.slot, self._command, self._told = slot, command, told
        self.name = ""  # of its lane's present life
        self.process: subprocess.Popen[str] | None = None
        self.given_up = False
        self.problem = ""  # why it ended, in its own words
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._keep, name=f"worker {slot}", daemon=True)

    def start(self) -> None:
        """Begin; returns at once."""
        self._thread.start()

    def say(self, words: dict) -> None:
        """One JSON line for the worker to read."""
        process = self.process
        try:
            if process is not None and process.stdin is not None:
                process.stdin.write(json.dumps(words) + "\n")
                process.stdin.flush()
        except OSError:
            pass  # it is gone, as the thread that waits for it tells

    def stop(self) -> None:
        """Ask it to end, then end it."""
        self._stopping.set()
        if (process := self.process) is not None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
        self._thread.join()

    def _keep(self) -> None:
        wait_s, starts = FIRST_WAIT_S, 0
        while not self._stopping.is_set():
            began = time.monotonic()
            code = self._live()
            if self._stopping.is_set():
                return
            if time.monotonic() - began > STEADY_S:
                wait_s, starts = FIRST_WAIT_S, 0
            starts += 1
            self.given_up = code == CONFIGURATION or starts >= MOST_STARTS
            self._told(self.slot, {"event": "exit", "code": code, "name": self.name, "given_up": self.given_up})
            if self.given_up:
                return
            logger.warning("worker %s ended with code %s; started again in %.1f s", self.slot, code, wait_s)
            self._stopping.wait(wait_s)
            wait_s = min(2 * wait_s, LONGEST_WAIT_S)

    def _live(self) -> int:
        """One process from its start to its end."""
        process = self.process = subprocess.Popen(
            self._command.arguments,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=dict(self._command.environment),
            start_new_session=True,
        )
        if self._stopping.is_set():  # asked to end between two processes
            process.terminate()
        assert process.stdout is not None and process.stderr is not None and process.stdin is not None
        errors = threading.Thread(target=self._pass_on, args=(process.stderr,), daemon=True)
        errors.start()
        for line in process.stdout:
            self._line(line)
        code = process.wait()
        errors.join()
        for stream in (process.stdin, process.stdout, process.stderr):
            stream.close()
        return code

    def _line(self, line: str) -> None:
        try:
            words = json.loads(line)
        except ValueError:
            logger.info("worker %s: %s", self.slot, line.rstrip())
            return
        if isinstance(words, dict):
            self.name = str(words.get("name", self.name))
            self._told(self.slot, words)

    def _pass_on(self, stream: IO[str]) -> None:
        for line in stream:
            if line.startswith("{"):  # a log line of its own
                sys.stderr.write(line)
            elif line.startswith(ERROR):
                self.problem = line.removeprefix(ERROR).rstrip()
            else:
                logger.info("worker %s: %s", self.slot, line.rstrip())


class Supervisor:
    """All workers. `told(slot, words)` hears of every line and every exit, on a thread of the worker's."""

    def __init__(self, commands: Mapping[str, Command], told: Callable[[str, dict], None]):
        self._ready: dict[str, dict] = {}
        self._change = threading.Condition()
        self._outside = told
        self.workers = {slot: Worker(slot, command, self._hear) for slot, command in commands.items()}

    def start(self, progress: Callable[[str, int, int], None]) -> dict[str, dict]:
        """Start all and wait until each is ready: their facts. Raises ConfigError when one cannot be started."""
        for worker in self.workers.values():
            worker.start()
        with self._change:
            while len(self._ready) < len(self.workers):
                progress("starting workers", len(self._ready), len(self.workers))
                if gone := [slot for slot, worker in self.workers.items() if worker.given_up]:
                    break
                self._change.wait(0.2)
            else:
                return dict(self._ready)
        self.stop()
        problem = self.workers[gone[0]].problem or "its process ended; its last lines above say why"
        raise ConfigError(f"lane {gone[0]}: {problem}")

    def stop(self) -> None:
        """End all of them."""
        for worker in self.workers.values():
            worker.stop()

    def _hear(self, slot: str, words: dict) -> None:
        with self._change:
            if words.get("event") == "ready":
                self._ready[slot] = words
            self._change.notify_all()
        self._outside(slot, words)
