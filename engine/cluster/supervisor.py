"""Starts the processes of each lane and keeps them: a lane has one process, or several that live as one.

    start --> STARTING --all of a lane are there and ready (engine/cluster/group.py)--> READY
              any of them exits, or says no hello within HELLO_S --> all of them end --waits (doubling)--> STARTING
              a configuration error (2), processes that do not fit (78), too many starts --> given up, and a host
              that is missing (69) when the lane was never ready

A process prints one JSON object a line: hello, stage, ready, life (whenever its lane has a new name), lost. It
reads JSON lines, which say with whom to meet and how to join, and ends when its input ends: so it dies with whoever
started it, also at the other end of an ssh channel. Costs two threads a process and one a lane.
"""

import contextlib
import json
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import IO

from engine.cluster.group import Group
from engine.errors import ConfigError, Misfit, SeracError, Unavailable

FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 30.0
STEADY_S = 60.0  # a lane that lived so long starts with a fresh count
LOOK_S = 0.2
MOST_STARTS = 6
STOP_S = 10.0
LAST_LINES = 20
FINAL = (ConfigError.exit_code, Misfit.exit_code)
ERROR = "serac: error: "

logger = logging.getLogger("serac.supervisor")

Told = Callable[[str, dict], None]  # (lane, words)


@dataclass(frozen=True, slots=True)
class Command:
    """How to start a process, and where that is, for a person."""

    arguments: Sequence[str]
    environment: Mapping[str, str]
    host: str = "this host"


class Process:
    """Rank `rank` of a lane, from its start to its end. `put((rank, words))` gets each line, None at the end."""

    def __init__(self, lane: str, rank: int, command: Command, put: Callable[[tuple[int, dict | None]], None]):
        self.rank, self.command, self._put = rank, command, put
        self.problem = ""  # why it ended, in its own words
        self.last: deque[str] = deque(maxlen=LAST_LINES)
        self._name = f"{lane}/{rank}" if rank else lane
        self.popen = subprocess.Popen(
            command.arguments,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=dict(command.environment),
            start_new_session=True,
        )
        self._errors = threading.Thread(target=self._pass_on, args=(self.popen.stderr,), daemon=True)
        self._lines = threading.Thread(target=self._read, args=(self.popen.stdout,), daemon=True)
        self._errors.start()
        self._lines.start()

    def say(self, words: dict) -> None:
        """One JSON line for the process to read."""
        assert self.popen.stdin is not None
        with contextlib.suppress(OSError, ValueError):  # it is gone, as the thread that reads from it tells
            self.popen.stdin.write(json.dumps(words) + "\n")
            self.popen.stdin.flush()

    def end(self, until: float) -> None:
        """Wait until then for one that was asked to end, then end it with all that it started."""
        try:
            self.popen.wait(max(until - time.monotonic(), 0.01))
        except subprocess.TimeoutExpired:
            os.killpg(self.popen.pid, signal.SIGKILL)
            self.popen.wait()
        self._lines.join()
        self._errors.join()
        for stream in (self.popen.stdin, self.popen.stdout, self.popen.stderr):
            assert stream is not None
            with contextlib.suppress(OSError):  # what it never read
                stream.close()

    def _read(self, stream: IO[str]) -> None:
        for line in stream:
            try:
                words = json.loads(line)
            except ValueError:
                logger.info("worker %s: %s", self._name, line.rstrip())
                continue
            if isinstance(words, dict):
                self._put((self.rank, words))
        self.popen.wait()
        self._errors.join()
        self._put((self.rank, None))

    def _pass_on(self, stream: IO[str]) -> None:
        for line in stream:
            self.last.append(line.rstrip())
            if line.startswith("{"):  # a log line of its own
                sys.stderr.write(line)
            elif line.startswith(ERROR):
                self.problem = line.removeprefix(ERROR).rstrip()
            else:
                logger.info("worker %s: %s", self._name, line.rstrip())


class Worker:
    """One lane: its processes, and the ones after them. `commands` by rank."""

    def __init__(self, slot: str, commands: Sequence[Command], told: Told):
        self.slot, self._commands, self._told = slot, commands, told
        self.name = ""  # of its lane's present life
        self.processes: tuple[Process, ...] = ()
        self.given_up = self.served = False
        self.problem = ""  # why it ended, in its own words
        self.code = 0  # of its last end
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._keep, name=f"worker {slot}", daemon=True)

    def start(self) -> None:
        """Begin; returns at once."""
        self._thread.start()

    def say(self, words: Sequence[dict]) -> None:
        """A JSON line for each process, by rank."""
        for process, each in zip(self.processes, words, strict=True):
            process.say(each)

    def stop(self) -> None:
        """Ask all of its processes to end, then end them."""
        self._stopping.set()
        self._thread.join()

    def _keep(self) -> None:
        wait_s, starts = FIRST_WAIT_S, 0
        while not self._stopping.is_set():
            began = time.monotonic()
            code = self.code = self._live()
            if self._stopping.is_set():
                return
            if time.monotonic() - began > STEADY_S:
                wait_s, starts = FIRST_WAIT_S, 0
            starts += code != Unavailable.exit_code  # a host that is cut off comes back some time
            missing = code == Unavailable.exit_code and not self.served  # a person waits, and is told at once
            self.given_up = code in FINAL or missing or starts >= MOST_STARTS
            self._told(self.slot, {"event": "exit", "code": code, "name": self.name, "given_up": self.given_up})
            if self.given_up:
                return
            logger.warning(
                "lane %s ended with code %s%s; started again in %.1f s",
                *(self.slot, code, f" ({self.problem})" if self.problem else "", wait_s),
            )
            self._stopping.wait(wait_s)
            wait_s = min(2 * wait_s, LONGEST_WAIT_S)

    def _live(self) -> int:
        """One life: from the start of all processes to the end of the first, and of the others with it."""
        events: queue.SimpleQueue[tuple[int, dict | None]] = queue.SimpleQueue()
        group = Group(self.slot, [command.host for command in self._commands], time.monotonic())
        self.name, first = "", 0
        self.processes = tuple(
            Process(self.slot, rank, command, events.put) for rank, command in enumerate(self._commands)
        )
        while not (self._stopping.is_set() or group.code):
            group.look(time.monotonic())
            try:
                rank, words = events.get(timeout=LOOK_S)
            except queue.Empty:
                continue
            if words is None:
                first = rank
                break
            self._hear(group, rank, words)
        codes = self._end()
        self.problem = group.problem or next((p.problem for p in self.processes if p.problem), "")
        return group.code or next((code for code in codes if code in FINAL), codes[first])

    def _hear(self, group: Group, rank: int, words: dict) -> None:
        was_ready = group.facts is not None
        for other, answer in group.heard(rank, words):
            self.processes[other].say(answer)
        if rank == 0 and words.get("event") == "life":
            self.name = str(words.get("name", ""))
        if words.get("event") in ("life", "stage"):
            self._told(self.slot, {**words, "rank": rank})
        elif group.facts is not None and not was_ready:
            self.served = True
            self._told(self.slot, group.facts)

    def _end(self) -> list[int]:
        """End what still runs; the exit codes by rank."""
        for process in self.processes:
            process.popen.send_signal(signal.SIGTERM)
        until = time.monotonic() + STOP_S
        for process in self.processes:
            process.end(until)
        return [process.popen.returncode for process in self.processes]


class Supervisor:
    """All lanes, each with the commands of its processes. `told(lane, words)` hears of what concerns the front."""

    def __init__(self, commands: Mapping[str, Sequence[Command]], told: Told):
        self._ready: dict[str, dict] = {}
        self._stages: dict[tuple[str, int], tuple[str, int, int]] = {}
        self._change = threading.Condition()
        self._outside = told
        self.workers = {slot: Worker(slot, each, self._hear) for slot, each in commands.items()}

    def start(self, progress: Callable[[str, int, int], None]) -> dict[str, dict]:
        """Start all and wait until each is ready: their facts. Raises what a lane that cannot be started has."""
        for worker in self.workers.values():
            worker.start()
        with self._change:
            while len(self._ready) < len(self.workers):
                progress(*self._shown())
                if gone := [worker for worker in self.workers.values() if worker.given_up]:
                    break
                self._change.wait(LOOK_S)
            else:
                return dict(self._ready)
        self.stop()
        raise refused(gone[0])

    def stop(self) -> None:
        """End all of them."""
        stopping = [threading.Thread(target=worker.stop) for worker in self.workers.values()]
        for thread in stopping:
            thread.start()
        for thread in stopping:
            thread.join()

    def _shown(self) -> tuple[str, int, int]:
        """What the slowest process does, for one line of progress."""
        late = {key: stage for key, stage in self._stages.items() if key[0] not in self._ready}
        if not late:
            return "starting workers", len(self._ready), len(self.workers)
        (lane, rank), (stage, done, of) = min(late.items(), key=lambda item: item[1][1] / max(item[1][2], 1))
        return f"{lane}/{rank} {stage}", done, of

    def _hear(self, slot: str, words: dict) -> None:
        with self._change:
            match words.get("event"):
                case "ready":
                    self._ready[slot] = words
                case "stage":
                    self._stages[slot, words["rank"]] = words["stage"], words["done"], words["of"]
            self._change.notify_all()
        if words.get("event") != "stage":
            self._outside(slot, words)


def refused(worker: Worker) -> SeracError:
    """Why a lane cannot be started, with the exit code of its kind; the last lines of its processes are logged."""
    for process in worker.processes:
        for line in process.last:
            logger.error("lane %s rank %d on %s: %s", worker.slot, process.rank, process.command.host, line)
    problem = worker.problem or "its process ended; its last lines above say why"
    kind = {Unavailable.exit_code: Unavailable, Misfit.exit_code: Misfit}.get(worker.code, ConfigError)
    return kind(f"lane {worker.slot}: {problem}")
