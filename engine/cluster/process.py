"""One process of a lane as its supervisor sees it: lines out, lines in, an end. Two kinds.

    Started   ours: a command with pipes; its lines come over its standard output, it ends when its input does
    Seat      others' (Slurm, Kubernetes, Ray): it comes by itself over a link to the front, and leaves with 75

`put((rank, words))` gets each line, and (rank, None) the end.
"""

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Protocol

from engine.errors import GroupLost, Unavailable

LAST_LINES = 20
MOST_EARLY = 16  # its hello is the first
ERROR = "serac: error: "
OF_SSH = 255  # its own exit code, and that of a process that was killed there

logger = logging.getLogger("serac.supervisor")

Put = Callable[[tuple[int, dict | None]], None]


@dataclass(frozen=True, slots=True)
class Command:
    """How to start a process, and where that is, for a person; `away` where it is ssh that goes there."""

    arguments: Sequence[str]
    environment: Mapping[str, str]
    host: str = "this host"
    away: bool = False


class Process(Protocol):
    """`last` lines and `problem` say why it ended, in its own words; `code` is that of its exit."""

    rank: int
    host: str
    problem: str
    last: deque[str]
    code: int

    def say(self, words: dict) -> None: ...
    def leave(self, code: int) -> None: ...
    def end(self, until: float) -> None: ...


class Started:
    """A command that runs from now on. `copy` gets each line that it says beside its events."""

    def __init__(self, lane: str, rank: int, command: Command, put: Put, copy: Callable[[str], None]):
        self.rank, self.host, self._put, self._copy = rank, command.host, put, copy
        self._away, self._came = command.away, False
        self.problem, self.code = "", 0
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

    def leave(self, code: int) -> None:
        """Ask it to end. A signal would end ssh alone; what is away ends with its input, and ssh with it."""
        if not self._away:
            self.popen.send_signal(signal.SIGTERM)
            return
        self.say({"leave": code})
        assert self.popen.stdin is not None
        with contextlib.suppress(OSError):  # what it never read
            self.popen.stdin.close()

    def end(self, until: float) -> None:
        """Wait until then for one that was asked to end, then end it with all that it started."""
        try:
            self.popen.wait(max(until - time.monotonic(), 0.01))
        except subprocess.TimeoutExpired:
            os.killpg(self.popen.pid, signal.SIGKILL)
        self.code = self.popen.wait()
        if self._away and self.code == OF_SSH and not self._came:  # its host is not there now, and may be later
            self.code = Unavailable.exit_code
            self.problem = self.problem or f"{self.host} is not reached over ssh"
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
                self._came = True
                self._put((self.rank, words))
        self.popen.wait()
        self._errors.join()
        self._put((self.rank, None))

    def _pass_on(self, stream: IO[str]) -> None:
        for line in stream:
            self.last.append(line.rstrip())
            self._copy(line.rstrip())
            if line.startswith("{"):  # a log line of its own
                sys.stderr.write(line)
            elif line.startswith(ERROR):
                self.problem = line.removeprefix(ERROR).rstrip()
            else:
                logger.info("worker %s: %s", self._name, line.rstrip())


class Seat:
    """Where a process that others start comes to sit. What it says before its lane's next life begins is kept."""

    def __init__(self, rank: int, host: str):
        self.rank, self.host = rank, host
        self.problem, self.code = "", GroupLost.exit_code
        self.last: deque[str] = deque(maxlen=LAST_LINES)
        self._lock = threading.Lock()
        self._who, self._tell = "", nobody
        self._early: list[dict] = []
        self._put: Put | None = None  # None between two lives

    def begin(self, put: Put) -> None:
        """A life of its lane begins."""
        with self._lock:
            self._put = put
            for words in self._early:
                put((self.rank, words))
            self._early.clear()

    def come(self, who: str, tell: Callable[[dict], None]) -> bool:
        """`who` wants to sit here, and hears by `tell`; False where somebody does."""
        with self._lock:
            if self._who:
                return False
            self._who, self._tell = who, tell
            return True

    def heard(self, words: dict) -> None:
        """A line of who sits here."""
        with self._lock:
            if self._put is not None:
                self._put((self.rank, words))
            elif len(self._early) < MOST_EARLY:
                self._early.append(words)

    def gone(self, who: str) -> None:
        """The connection of `who` has ended."""
        with self._lock:
            if self._who != who:
                return
            self._who, self._tell = "", nobody
            self._early.clear()
            if self._put is not None:
                self._put((self.rank, None))

    def say(self, words: dict) -> None:
        """A line for who sits here; nobody hears it where nobody does."""
        self._tell(words)

    def leave(self, code: int) -> None:
        """Ask it to end with `code`, by which its engine knows whether to start it again."""
        self.say({"leave": code})

    def end(self, until: float) -> None:
        """Wait until then for it to be gone; whoever stays has no seat any more."""
        while self._who and time.monotonic() < until:
            time.sleep(0.05)
        with self._lock:
            self._who, self._tell, self._put = "", nobody, None


def nobody(words: dict) -> None:
    """Who hears what is said to an empty seat."""
