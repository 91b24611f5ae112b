"""Time as an argument: the same code runs under the machine's clock and under a clock that a test moves."""

import time
from typing import Protocol


class Clock(Protocol):
    """What tells the time to everything that decides."""

    def now(self) -> float:
        """Seconds on a monotonic scale."""
        ...


class SystemClock:
    """The machine's monotonic clock."""

    def now(self) -> float:
        return time.monotonic()


class ManualClock:
    """A clock that stands still until it is moved."""

    def __init__(self, at: float = 0.0):
        self._at = at

    def now(self) -> float:
        return self._at

    def advance(self, seconds: float) -> None:
        assert seconds >= 0
        self._at += seconds
