"""A log of each process of each lane, in files beside each other: what it said, as JSON lines.

    DIR/p0-0.jsonl   {"event": "hello", ...}              what it tells whoever started it
                     {"level": "info", ...}               its own log, as it is
                     {"time": 1.5, "said": "..."}         any other line of its standard error
    DIR/p0-0.jsonl.1 .. .3                               before that, MOST_BYTES each

Only their owner may read them. A process that others started (Slurm, Kubernetes, Ray) keeps its own log: of it
there are the events alone. Costs a write a line.
"""

import json
import logging
import os
import threading
import time
from collections.abc import Callable
from logging.handlers import RotatingFileHandler
from pathlib import Path

from engine.errors import ConfigError, wrong

MOST_BYTES, KEPT = 16 << 20, 3
BY_OWNER = 0o600
STAGE = "stage"  # said many times a second


class RankLogs:
    """Below `folder`, made where it is missing; nowhere when that is None. Any thread may call.

    Raises ConfigError where it cannot be written.
    """

    def __init__(self, folder: Path | None):
        self._folder, self._lock = folder, threading.Lock()
        self._files: dict[tuple[str, int], RotatingFileHandler] = {}
        try:
            if folder is not None:
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                _open(folder / "none").close()
                (folder / "none").unlink()
        except OSError as error:
            expected = f"a folder to write in ({error.strerror})"
            raise ConfigError(wrong("log_dir", str(folder), expected), field="log_dir") from None

    def of(self, lane: str, rank: int) -> Callable[[str], None]:
        """Takes the lines of a process that are no events."""
        return lambda line: self._write(lane, rank, line if _is_object(line) else _said(line))

    def event(self, lane: str, rank: int, words: dict) -> None:
        """What a process told; how far it has come is not kept."""
        if words.get("event") != STAGE:
            self._write(lane, rank, json.dumps({"time": time.time(), **words}))

    def close(self) -> None:
        """Close the files; what comes later opens its own again."""
        with self._lock:
            for file in self._files.values():
                file.close()
            self._files.clear()

    def _write(self, lane: str, rank: int, line: str) -> None:
        if self._folder is None:
            return
        with self._lock:
            file = self._files.get((lane, rank))
            if file is None:
                file = self._files[lane, rank] = _open(self._folder / f"{lane}-{rank}.jsonl")
            file.emit(logging.LogRecord("", logging.INFO, "", 0, line, None, None))


def _open(path: Path) -> RotatingFileHandler:
    path.touch(BY_OWNER)
    made = RotatingFileHandler(path, maxBytes=MOST_BYTES, backupCount=KEPT, encoding="utf-8")
    made.rotator = _rotate
    return made


def _rotate(source: str, target: str) -> None:
    """Move a full file away; the next is its owner's alone, too."""
    os.replace(source, target)
    Path(source).touch(BY_OWNER)


def _is_object(line: str) -> bool:
    return line.startswith("{") and line.endswith("}")


def _said(line: str) -> str:
    return json.dumps({"time": time.time(), "said": line})


NOWHERE = RankLogs(None)
