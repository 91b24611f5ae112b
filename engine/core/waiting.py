"""Sequences that want a row, in the order they get one.

arrived   hold blocks already, whose KV came from another lane: only a row lets their blocks go, so they go first
          while the pool has none for who came before them
queue     hold nothing; who was preempted goes to the front
"""

from collections import deque
from collections.abc import Iterator

from engine.core.sequence import Sequence


class Waiting:
    """Two queues seen as one."""

    def __init__(self) -> None:
        self._arrived: deque[Sequence] = deque()
        self._queue: deque[Sequence] = deque()

    def append(self, sequence: Sequence) -> None:
        """Wait behind the others."""
        self._queue.append(sequence)

    def insert(self, sequence: Sequence) -> None:
        """Wait before the others that hold nothing."""
        self._queue.appendleft(sequence)

    def put_back(self, sequence: Sequence) -> None:
        """Wait among those that hold nothing in the order they came, as serials tell."""
        later = 0
        while later < len(self._queue) and self._queue[-1 - later].serial > sequence.serial:
            later += 1
        self._queue.insert(len(self._queue) - later, sequence)

    def arrive(self, sequence: Sequence) -> None:
        """`sequence`, which waits, has got blocks."""
        self._queue.remove(sequence)
        self._arrived.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """It waits no longer."""
        (self._arrived if sequence.blocks else self._queue).remove(sequence)

    def strip(self) -> None:
        """The pool is gone: nobody holds anything."""
        for sequence in reversed(self._arrived):
            sequence.blocks, sequence.computed = [], 0
            self._queue.appendleft(sequence)
        self._arrived.clear()

    @property
    def first(self) -> Sequence | None:
        """Who came first, as serials tell: neither queue waits for the other to be empty."""
        heads = [queue[0] for queue in (self._arrived, self._queue) if queue]
        return min(heads, key=lambda sequence: sequence.serial, default=None)

    @property
    def arrived(self) -> Sequence | None:
        """The first that holds blocks."""
        return self._arrived[0] if self._arrived else None

    @property
    def hungry(self) -> Sequence | None:
        """The first that holds nothing."""
        return self._queue[0] if self._queue else None

    def __iter__(self) -> Iterator[Sequence]:
        yield from self._arrived
        yield from self._queue

    def __len__(self) -> int:
        return len(self._arrived) + len(self._queue)
