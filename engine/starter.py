"""A worker's side of the lines between it and whoever started it, or keeps its seat at the front.

    said   hello, stage, ready, life, lost                  one JSON object a line
    heard  start, front, tls, leave, beat, refused          what to join comes this way, never in arguments

    Pipes   over standard input and output, where whoever started this process holds them
    Visit   over a link to the front, where an engine started it that knows nothing of lanes

The starter says a beat every few seconds. When its lines end, or nothing comes for long, since a cut connection may
look like a quiet one, this process ends: by SIGTERM, and where that does not help within GRACE_S, as it may wait in
a collective for a process that is no more, at once. So it dies with its starter, also at the far end of a network.
"""

import json
import logging
import os
import queue
import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import IO, Protocol

from engine.core.membership import Line
from engine.core.messages import FRONT
from engine.errors import GroupLost, Misfit
from engine.movers.links import Links
from engine.movers.tls import Tls

GRACE_S = 10.0
STAGE_S = 0.25  # between two words of the same stage
AGAIN_S = 1.0  # between two hellos to a front that does not answer
SILENT = 30  # turns of a second without a line
KEPT = ("start", "front")

logger = logging.getLogger("serac.worker")


class Lines(Protocol):
    """Where lines come from and go to."""

    def read(self) -> Iterator[str]: ...
    def write(self, text: str) -> None: ...


class Pipes:
    """Standard input and output."""

    def __init__(self, source: IO[str], out: IO[str]):
        self._source, self._out, self._lock = source, out, threading.Lock()

    def read(self) -> Iterator[str]:
        """Lines until the input ends."""
        return iter(self._source)

    def write(self, text: str) -> None:
        """One line."""
        with self._lock:
            print(text, file=self._out, flush=True)


class Visit:
    """A link to the front at `address`; what is said first is said again until the front answers."""

    def __init__(self, name: str, address: str, secret: bytes, tls: Tls | None):
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._answered = threading.Event()
        name = f"process {name} {secrets.token_hex(8)}"
        self._links = Links(name, secret, self._hear, lambda peer: self._lines.put(None), tls=tls)
        self._links.start()
        self._links.meet(FRONT, address)

    def read(self) -> Iterator[str]:
        """Lines until the connection ends."""
        return iter(self._lines.get, None)

    def write(self, text: str) -> None:
        """One line."""
        self._links.post(FRONT, Line(text))
        if not self._answered.is_set():
            threading.Thread(target=self._again, args=(text,), daemon=True).start()

    def _again(self, text: str) -> None:
        while not self._answered.wait(AGAIN_S):
            self._links.post(FRONT, Line(text))

    def _hear(self, sender: str, message: object) -> None:
        if isinstance(message, Line):
            self._answered.set()
            self._lines.put(message.text)


class Starter:
    """`lines` are read on a thread, from now on."""

    def __init__(self, lines: Lines):
        self._lines = lines
        self._heard: dict[str, queue.SimpleQueue[dict]] = {key: queue.SimpleQueue() for key in KEPT}
        self._stage = ("", 0.0)
        self._turns = 0  # without a line
        self.exit_code = 0
        self.on_tls: Callable[[dict], None] | None = None
        for work in (self._listen, self._watch):
            threading.Thread(target=work, name="starter", daemon=True).start()

    def say(self, **words: object) -> None:
        """One line."""
        self._lines.write(json.dumps(words))

    def show(self, what: str, done: int, of: int) -> None:
        """How far this process has come; a Progress."""
        now = time.monotonic()
        if done in (0, of) or now - self._stage[1] > STAGE_S or what != self._stage[0]:
            self._stage = what, now
            self.say(event="stage", stage=what, done=done, of=of)

    def wait(self, key: str) -> dict:
        """The next line that has `key`."""
        return self._heard[key].get()

    def lost(self, reason: str) -> None:
        """The lane cannot go on: say why and end this process, whatever its threads do. Does not return."""
        logger.error("this process ends, and its lane with it: %s", reason)
        self.say(event="lost", reason=reason)
        time.sleep(AGAIN_S / 10)  # what a link was given leaves on another thread
        os._exit(GroupLost.exit_code)

    def _listen(self) -> None:
        for line in self._lines.read():
            self._turns = 0
            words = json.loads(line)
            if "refused" in words:
                logger.error("the front refused this process: %s", words["refused"])
                os._exit(Misfit.exit_code)
            if "leave" in words:
                self.exit_code = int(words["leave"])
                break
            if "tls" in words and self.on_tls is not None:
                self.on_tls(words["tls"])
            for key in KEPT:
                if key in words:
                    self._heard[key].put(words)
        self._end()

    def _watch(self) -> None:
        while self._turns <= SILENT:
            time.sleep(1.0)
            self._turns += 1
        logger.error("whoever started this process has said nothing for %d s; it ends", SILENT)
        self.exit_code = GroupLost.exit_code
        self._end()

    def _end(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(GRACE_S)
        os._exit(self.exit_code or GroupLost.exit_code)
