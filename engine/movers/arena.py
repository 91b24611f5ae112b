"""Memory that one process of this host writes and another reads: the two ends of one segment.

    Arena     writer   take -> slot --room: written--> read over there --give--> free    first fit: low pages, warm
    Borrowed  reader   cut -> array that nobody can write -> nobody holds it or a view of it --freed--> writer told

The segment is a file without a name (memfd), so it is gone with the last process that maps it, however that ends.
It can neither shrink nor grow: a reader refuses one that could shrink under it, which would kill it. Pages come
when they are first written (1.5 GB/s, once) and stay; where there is no memory for them that is an OSError, no
signal.

Can the bytes change after the reader has checked them? The writer still maps them, so it could; but it has proved
that it knows the cluster's secret, and who lies could as well send other KV with right checksums. Against mistakes:
a slot is written again only after the reader has said that nobody holds it, the reader refuses a slot that overlaps
one it still holds, and the writer refuses to be told twice.
"""

import fcntl
import mmap
import os
import weakref
from bisect import bisect_left
from collections import deque
from collections.abc import Callable

import numpy as np

from engine.errors import Malformed

ALIGNED = 64  # bytes: where slots begin
MOST_SLOTS = 1024
MOST_BYTES = 1 << 36  # of a segment that a reader maps
SEALS = ("F_SEAL_SHRINK", "F_SEAL_GROW", "F_SEAL_SEAL")


def available() -> bool:
    """Whether this system has such memory; Linux does."""
    return hasattr(os, "memfd_create") and hasattr(fcntl, "F_ADD_SEALS")


class Slots:
    """Ranges of a segment that are in use, none over another."""

    def __init__(self, num_bytes: int):
        self.num_bytes = num_bytes
        self._starts: list[int] = []
        self._stops: list[int] = []

    def __len__(self) -> int:
        return len(self._starts)

    def find(self, size: int) -> int | None:
        """The lowest place where `size` bytes are free."""
        start = 0
        for taken, stop in zip(self._starts, self._stops, strict=True):
            if taken - start >= size:
                break
            start = _aligned(stop)
        return start if start + size <= self.num_bytes and len(self) < MOST_SLOTS else None

    def add(self, offset: int, size: int) -> bool:
        """Whether these bytes were there and free; they are in use now."""
        stop = offset + size
        place = bisect_left(self._starts, offset)
        before = self._stops[place - 1] if place else 0
        after = self._starts[place] if place < len(self) else self.num_bytes
        if offset % ALIGNED or size <= 0 or not before <= offset <= stop <= after or len(self) >= MOST_SLOTS:
            return False
        self._starts.insert(place, offset)
        self._stops.insert(place, stop)
        return True

    def remove(self, offset: int) -> bool:
        """Whether a slot in use began there; it is free now."""
        place = bisect_left(self._starts, offset)
        if place == len(self) or self._starts[place] != offset:
            return False
        del self._starts[place], self._stops[place]
        return True

    def check(self) -> None:
        """Raise AssertionError where slots overlap or leave the segment."""
        edges = [edge for pair in zip(self._starts, self._stops, strict=True) for edge in pair]
        assert edges == sorted(edges) and all(edge <= self.num_bytes for edge in edges), edges
        assert not any(start % ALIGNED for start in self._starts) and len(self) <= MOST_SLOTS


class Arena:
    """The writer's end. Raises OSError where the system has no such memory."""

    def __init__(self, num_bytes: int):
        if not available():
            raise OSError("no memory to share on this system")
        self.slots = Slots(num_bytes)
        self.descriptor = os.memfd_create("serac-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        self._written = 0  # up to here pages are there
        try:
            os.ftruncate(self.descriptor, num_bytes)
            fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, sum(getattr(fcntl, name) for name in SEALS))
            self._bytes = np.frombuffer(mmap.mmap(self.descriptor, num_bytes), np.uint8)
        except BaseException:
            self.close()
            raise

    def take(self, size: int) -> int | None:
        """A slot of so many bytes, if there is room for it."""
        offset = self.slots.find(size)
        return offset if offset is not None and self.slots.add(offset, size) else None

    def room(self, start: int, stop: int) -> np.ndarray:
        """Bytes to write. Raises OSError where no memory is left for them."""
        if stop > self._written:
            os.posix_fallocate(self.descriptor, self._written, stop - self._written)
            self._written = stop
        return self._bytes[start:stop]

    def give(self, offset: int) -> None:
        """The reader is done with the slot that begins there. Raises Malformed where none does."""
        if not self.slots.remove(offset):
            raise Malformed("shared: got a slot as free that was not in use")

    def close(self) -> None:
        """Let go of the segment; whoever still reads it keeps it."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


class Borrowed:
    """The reader's end. `on_freed()` is called on any thread, even amid a collection of garbage.

    Raises Malformed for what is no segment, OSError where it cannot be mapped. The descriptor stays the caller's.
    """

    def __init__(self, descriptor: int, num_bytes: int, on_freed: Callable[[], None]):
        try:
            seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
        except OSError:
            raise Malformed("shared: got a descriptor that is no shared memory") from None
        if not seals & fcntl.F_SEAL_SHRINK:
            raise Malformed("shared: got memory that may shrink; expected it sealed")
        if not 0 < num_bytes <= min(os.fstat(descriptor).st_size, MOST_BYTES):
            raise Malformed(f"shared: got {num_bytes} bytes as the size of memory that has others")
        self.slots = Slots(num_bytes)
        self._map = mmap.mmap(descriptor, num_bytes, prot=mmap.PROT_READ)
        self._freed: deque[int] = deque()
        self._on_freed = on_freed

    def cut(self, offset: int, size: int) -> np.ndarray:
        """The bytes of a slot, which is in use until nobody holds this array or a view of it. Raises Malformed."""
        if not self.slots.add(offset, size):
            raise Malformed("shared: got a slot out of bounds, not aligned, or over one in use")
        root = np.frombuffer(self._map, np.uint8, size, offset)
        weakref.finalize(root, self._free, offset).atexit = False
        return root

    @property
    def pending(self) -> bool:
        """Whether `freed` has something to tell."""
        return bool(self._freed)

    def freed(self) -> list[int]:
        """Slots that nobody holds any more, each told once."""
        told = []
        while self._freed:
            told.append(self._freed.popleft())
            self.slots.remove(told[-1])
        return told

    def _free(self, offset: int) -> None:
        self._freed.append(offset)
        self._on_freed()


def _aligned(size: int) -> int:
    return -(-size // ALIGNED) * ALIGNED
