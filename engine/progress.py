"""How far a long start has come: a bar for a person, a line for each stage and each few seconds for a log.

show(what, done, of): "loading weights" 12 of 97, "compiling decode 8x8 plain" 3 of 24, "p0/1 compiling ..." 3 of 9
"""

import time
from collections.abc import Callable
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

QUIET_S = 5.0  # a log says no more often than this that a stage goes on


class Bars:
    """One bar a stage; a stage is named by the first word of what is done. Use as a context."""

    def __init__(self, out: TextIO):
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._progress = Progress(*columns, console=Console(file=out))
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> "Bars":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, what: str, done: int, of: int) -> None:
        """Move the bar of this stage."""
        stage = what.split()[0]
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(what, total=of)
        self._progress.update(self._tasks[stage], description=what, completed=done, total=of)


class Lines:
    """The same for a log."""

    def __init__(self, out: TextIO, now: Callable[[], float] = time.monotonic):
        self._out, self._now = out, now
        self._said: dict[str, tuple[str, float]] = {}  # by stage

    def __enter__(self) -> "Lines":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def show(self, what: str, done: int, of: int) -> None:
        """Say that a stage begins, goes on or has ended."""
        stage, now = what.split()[0], self._now()
        line = f"{what} ({done} of {of})"
        last, said_at = self._said.get(stage, ("", -QUIET_S))
        if line == last or (done < of and now - said_at < QUIET_S):
            return
        self._said[stage] = line, now
        print(f"serac: {line}", file=self._out, flush=True)


def progress(out: TextIO) -> Bars | Lines:
    """What suits `out`."""
    return Bars(out) if out.isatty() else Lines(out)
