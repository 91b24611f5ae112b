"""Starts the processes of each lane and keeps them: a lane has one process, or several that live as one.

    start --> STARTING --all of a lane are there and ready (engine/cluster/group.py)--> READY
              any of them exits, or says no hello within HELLO_S --> all of them end --waits--> STARTING
              it served for less than was waited --> the next wait is double
              a configuration error (2), processes that do not fit (78), too many starts --> given up, and a host
              that is missing (69) when the lane was never ready

A process prints one JSON object a line: hello, stage, ready, life (whenever its lane has a new name), lost. It
reads JSON lines, which say with whom to meet and how to join, and ends when its input ends: so it dies with whoever
started it, also at the other end of an ssh channel. Costs two threads a process and one a lane.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence

from engine.cluster.group import Group
from engine.cluster.process import Command, Process, Put, Seat, Started
from engine.cluster.rank_logs import NOWHERE, RankLogs
from engine.errors import ConfigError, GroupLost, Misfit, SeracError, Unavailable

FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 30.0
MOST_STARTS = 6  # in a row after which it served no longer than it had been waited before
STOP_S = 10.0
LOOK_S = 0.2
BEAT_S = 2.0  # a process that hears nothing for long takes itself for cut off
FINAL = (ConfigError.exit_code, Misfit.exit_code)

logger = logging.getLogger("serac.supervisor")

Told = Callable[[str, dict], None]  # (lane, words)
Begin = Callable[[Put], Sequence[Process]]


class Worker:
    """One lane: its processes, and the ones after them. `begin` gives those of a life, by rank.

    ours          whether we start them; others come some time, and who has not is named and waited for
    certificates  the files that a process gets which has none on its host
    """

    def __init__(
        self,
        slot: str,
        begin: Begin,
        ours: bool,
        told: Told,
        certificates: Callable[[], dict | None],
        logs: RankLogs = NOWHERE,
    ):
        self.slot, self._begin, self._ours, self._told = slot, begin, ours, told
        self._certificates, self._logs = certificates, logs
        self.name = ""  # of its lane's present life
        self.processes: Sequence[Process] = ()
        self.given_up = self.served = False
        self.problem = ""  # why it ended, in its own words
        self.code = self.first = 0  # of its last end, and the rank that ended first
        self.lives, self.began_at = 0, 0.0  # and when the present one did
        self._ready_at: float | None = None  # since when it serves
        self.group: Group | None = None  # of the present life
        self._stopping, self._renewing = threading.Event(), threading.Event()
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

    def renew(self) -> None:
        """End this life and begin the next at once, which counts as no failure. Returns at once."""
        self._renewing.set()

    @property
    def stopping(self) -> bool:
        """Whether no life follows this one."""
        return self.given_up or self._stopping.is_set()

    def _keep(self) -> None:
        wait_s, starts = FIRST_WAIT_S, 0
        while not self._stopping.is_set():
            code = self.code = self._live()
            if self._stopping.is_set():
                return
            if self._renewing.is_set():
                self._told(self.slot, {"event": "exit", "code": code, "name": self.name, "given_up": False})
                continue
            if self._ready_at is not None and time.monotonic() - self._ready_at > wait_s:
                wait_s, starts = FIRST_WAIT_S, 0
            starts += code != Unavailable.exit_code  # a host that is cut off comes back some time
            missing = code == Unavailable.exit_code and not self.served  # a person waits, and is told at once
            self.given_up = code in FINAL or missing or starts >= MOST_STARTS
            self._told(self.slot, {"event": "exit", "code": code, "name": self.name, "given_up": self.given_up})
            if self.served or not self.given_up:
                why = f" ({self.problem})" if self.problem else ""
                level, then = logging.WARNING, f"started again in {wait_s:.1f} s"
                if self.given_up:
                    level, then = logging.ERROR, "given up: mend it and start all again"
                logger.log(level, "lane %s ended with code %s%s; %s", self.slot, code, why, then)
            if self.served:  # at a start `refused` does it, once no more are tried
                show_last(self)
            if self.given_up:
                return
            self._stopping.wait(wait_s)
            wait_s = min(2 * wait_s, LONGEST_WAIT_S)

    def _live(self) -> int:
        """One life: from the start of all processes to the end of the first, and of the others with it."""
        events: queue.SimpleQueue[tuple[int, dict | None]] = queue.SimpleQueue()
        self.name, first, beat_at = "", 0, 0.0
        self._ready_at = None
        self._renewing.clear()
        try:
            self.processes = self._begin(events.put)
        except OSError as error:  # a program that is not there, too many processes
            self.problem = f"its process cannot be started ({error.strerror})"
            return ConfigError.exit_code
        hosts = [process.host for process in self.processes]
        self.lives, self.began_at = self.lives + 1, time.monotonic()
        group = self.group = Group(hosts, self.began_at, patient=not self._ours)
        while not (self._stopping.is_set() or self._renewing.is_set() or group.code):
            now = time.monotonic()
            if notice := group.look(now):
                logger.warning("lane %s: %s", self.slot, notice)
            if now > beat_at:
                beat_at = now + BEAT_S
                self.say([{"beat": True}] * len(self.processes))
            try:
                rank, words = events.get(timeout=LOOK_S)
            except queue.Empty:
                continue
            if words is None and (self._ours or group.begun):
                first = rank
                break
            if words is not None:
                self._hear(group, rank, words)
        self.first, codes = first, self._end()
        said = (whose(process, len(hosts)) for process in self.processes if process.problem)
        self.problem = group.problem or next(said, "")
        return group.code or next((code for code in codes if code in FINAL), codes[first])

    def _hear(self, group: Group, rank: int, words: dict) -> None:
        was_ready = group.facts is not None
        self._logs.event(self.slot, rank, words)
        for other, answer in group.heard(rank, words):
            if (files := self._certificates()) is not None:
                answer["start"]["tls"] = files
            self.processes[other].say(answer)
        if rank == 0 and words.get("event") == "life":
            self.name = str(words.get("name", ""))
        if words.get("event") in ("life", "stage"):
            self._told(self.slot, {**words, "rank": rank})
        elif group.facts is not None and not was_ready:
            self.served, self._ready_at = True, time.monotonic()
            self._told(self.slot, group.facts)

    def _end(self) -> list[int]:
        """End what still runs; the exit codes by rank."""
        for process in self.processes:
            process.leave(0 if self._stopping.is_set() else GroupLost.exit_code)
        until = time.monotonic() + STOP_S
        for process in self.processes:
            process.end(until)
        return [process.code for process in self.processes]


class Supervisor:
    """All lanes, each with its processes: the commands that start them, or the seats where they come to sit.

    `told(lane, words)` hears of what concerns the front.
    """

    def __init__(
        self,
        lanes: Mapping[str, Sequence[Command] | Sequence[Seat]],
        told: Told,
        certificates: Callable[[], dict[str, str] | None] = lambda: None,
        logs: RankLogs = NOWHERE,
    ):
        self._ready: dict[str, dict] = {}
        self._stages: dict[tuple[str, int], tuple[str, int, int]] = {}
        self._change = threading.Condition()
        self._outside = told
        self._logs = logs
        self.workers = {slot: _worker(slot, each, self._hear, certificates, logs) for slot, each in lanes.items()}

    def start(self, progress: Callable[[str, int, int], None]) -> dict[str, dict]:
        """Start all and wait until each is ready: their facts. Raises what a lane that cannot be started has."""
        for worker in self.workers.values():
            worker.start()
        with self._change:
            while len(self._ready) < len(self.workers):
                progress("lanes ready", len(self._ready), len(self.workers))
                for (lane, rank), (stage, done, of) in self._stages.items():
                    progress(f"{lane}/{rank} {stage}", done, of)
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
        self._logs.close()

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


def _worker(
    slot: str,
    processes: Sequence[Command] | Sequence[Seat],
    told: Told,
    certificates: Callable[[], dict[str, str] | None],
    logs: RankLogs,
) -> Worker:
    """A lane whose processes are started here, or come."""

    def start(put: Put) -> Sequence[Process]:
        made: list[Started] = []
        try:
            for rank, each in enumerate(each for each in processes if isinstance(each, Command)):
                made.append(Started(slot, rank, each, put, logs.of(slot, rank)))
        except OSError:
            for begun in made:
                begun.leave(0)
                begun.end(time.monotonic() + STOP_S)
            raise
        return made

    def seat(put: Put) -> Sequence[Process]:
        seats = [each for each in processes if isinstance(each, Seat)]
        for each in seats:
            each.begin(put)
        return seats

    ours = isinstance(processes[0], Command)
    return Worker(slot, start if ours else seat, ours, told, certificates if ours else lambda: None, logs)


def refused(worker: Worker) -> SeracError:
    """Why a lane cannot be started, with the exit code of its kind; the last lines of its processes are logged."""
    show_last(worker)
    problem = worker.problem or "its process ended; its last lines above say why"
    kind = {Unavailable.exit_code: Unavailable, Misfit.exit_code: Misfit}.get(worker.code, ConfigError)
    return kind(f"lane {worker.slot}: {problem}")


def show_last(worker: Worker) -> None:
    """Log the last lines of its processes, of the one that ended first before those that ended for it."""
    for process in sorted(worker.processes, key=lambda process: process.rank != worker.first):
        for line in process.last:
            logger.error("lane %s rank %d on %s: %s", worker.slot, process.rank, process.host, line)


def whose(process: Process, processes: int) -> str:
    """What went wrong with a process of so many of its lane."""
    return f"rank {process.rank} on {process.host}: {process.problem}" if processes > 1 else process.problem
