"""Who may come in: open while the replica is ready and nobody drains it.

    open --drain()--> draining --last call leaves--> idle

A refused call costs nothing of the replica. `idle` is set whenever no admitted call is open.
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from engine.errors import Unavailable
from engine.serve.contract import Replica


class Gate:
    """Counts the calls that generate and refuses new ones while draining or not ready."""

    def __init__(self, replica: Replica):
        self._replica = replica
        self.open_calls = 0
        self.draining = False
        self.idle = asyncio.Event()
        self.idle.set()

    @property
    def ready(self) -> bool:
        """Whether a call would be admitted now."""
        return self._replica.ready and not self.draining

    def close(self) -> None:
        """From now on nobody comes in."""
        self.draining = True

    @contextmanager
    def enter(self) -> Iterator[None]:
        """Around a call. Raises Unavailable."""
        if self.draining:
            raise Unavailable("server: draining; try another replica")
        if not self._replica.ready:
            raise Unavailable("server: not ready; try again later")
        self.open_calls += 1
        self.idle.clear()
        try:
            yield
        finally:
            self.open_calls -= 1
            if self.open_calls == 0:
                self.idle.set()
