"""What waits to be sent one way to one peer: bounded in bytes, filled by any thread, emptied by the loop's.

    put (any thread) --> | waiting | --take--> being sent --sent-->          full: put says no, the core asks again

What is being sent still counts, so that a peer which reads nothing holds no more than `most_bytes` of ours.
"""

import threading
from collections import deque
from typing import Generic, TypeVar

Item = TypeVar("Item")
BATCH = 256  # most items sent at once


class Outgoing(Generic[Item]):
    """Items with their sizes."""

    def __init__(self, most_bytes: int):
        self.most_bytes, self.num_bytes = most_bytes, 0
        self._items: deque[tuple[Item, int]] = deque()
        self._lock = threading.Lock()

    def put(self, item: Item, size: int) -> bool:
        """Whether there was room. What is larger than all room goes when nothing else is there."""
        with self._lock:
            if self.num_bytes and self.num_bytes + size > self.most_bytes:
                return False
            self._items.append((item, size))
            self.num_bytes += size
            return True

    def take(self, most_bytes: int) -> tuple[list[Item], int]:
        """The oldest items of at most so many bytes, at least one if there is any, and their size."""
        with self._lock:
            taken, size = [], 0
            while self._items and len(taken) < BATCH and (not taken or size + self._items[0][1] <= most_bytes):
                item, one = self._items.popleft()
                taken.append(item)
                size += one
            return taken, size

    def sent(self, size: int) -> None:
        """So many bytes are no longer held."""
        with self._lock:
            self.num_bytes -= size

    def clear(self) -> int:
        """Drop what waits; how many items that were."""
        with self._lock:
            dropped = len(self._items)
            self.num_bytes -= sum(size for _, size in self._items)
            self._items.clear()
            return dropped

    def __bool__(self) -> bool:
        return bool(self._items)
