"""A worker's side of the lines between it and whoever started it, over its standard input and output.

    said   hello, stage, ready, life, lost          one JSON object a line
    heard  start, front                             what to join comes this way and so never stands in arguments

The starter is gone when its lines end: then this process ends too, by SIGTERM, and where that does not help within
GRACE_S, as it may wait in a collective for a process that is no more, at once. So it dies with its starter, also at
the other end of an ssh channel.
"""

import json
import os
import queue
import signal
import threading
import time
from typing import IO

from engine.errors import ConfigError, GroupLost

GRACE_S = 10.0
STAGE_S = 0.25  # between two words of the same stage


class Starter:
    """`source` is read on a thread, from now on."""

    def __init__(self, source: IO[str], out: IO[str]):
        self._source, self._out, self._lock = source, out, threading.Lock()
        self._lines: dict[str, queue.SimpleQueue[dict]] = {key: queue.SimpleQueue() for key in ("start", "front")}
        self._stage = ("", 0.0)
        threading.Thread(target=self._listen, name="starter", daemon=True).start()

    def say(self, **words: object) -> None:
        """One line."""
        with self._lock:
            print(json.dumps(words), file=self._out, flush=True)

    def show(self, what: str, done: int, of: int) -> None:
        """How far this process has come; a Progress."""
        now = time.monotonic()
        if done in (0, of) or now - self._stage[1] > STAGE_S or what != self._stage[0]:
            self._stage = what, now
            self.say(event="stage", stage=what, done=done, of=of)

    def wait(self, key: str) -> dict:
        """The next line that has `key`."""
        return self._lines[key].get()

    def lost(self, reason: str) -> None:
        """The lane cannot go on: say why and end this process, whatever its threads do. Does not return."""
        self.say(event="lost", reason=reason)
        os._exit(GroupLost.exit_code)

    def _listen(self) -> None:
        for line in self._source:
            words = json.loads(line)
            keys = [key for key in self._lines if isinstance(words, dict) and key in words]
            if not keys:
                raise ConfigError('worker: expected a line {"start": ...} or {"front": ...} on standard input')
            self._lines[keys[0]].put(words)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(GRACE_S)
        os._exit(GroupLost.exit_code)
