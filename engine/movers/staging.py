"""Memory of one process that a library moves bytes out of and into: the two halves of one mapping.

    Staging   sender    take -> slot --write: a part copied there--> read from afar --give--> free
    Landing   receiver  cut -> array that nobody can write; the library fills it -> nobody holds it -> free

The library keeps the addresses, so the mapping stays as long as it does, and longer where somebody holds an array.
Pages come when they are first written, unless the library pins them. Slots are those of engine/movers/arena.py.
A slot of a landing is in use for as long as anybody holds its array: the lane that got it, or the library, which
may go on writing into what was given up as too slow.
"""

import asyncio
import mmap
import weakref
from collections import deque
from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np

from engine.core.handoff import Parts
from engine.movers import parts
from engine.movers.arena import Slots

AT_ONCE = 1 << 20  # bytes copied without a look at the time
TURN_S = 0.001


class Region(NamedTuple):
    """Bytes that can be moved. memory: DRAM, or VRAM of device number `device`."""

    address: int
    num_bytes: int
    memory: str = "DRAM"
    device: int = 0


class OnDevice(Protocol):
    """What is asked of a device: that of a jax.Array's shard says as much."""

    @property
    def platform(self) -> str: ...
    @property
    def local_hardware_id(self) -> int | None: ...


class Buffer(Protocol):
    """What is asked of an array that lies on one device: `shard.data` of a jax.Array is one."""

    nbytes: int

    @property
    def device(self) -> OnDevice: ...
    def unsafe_buffer_pointer(self) -> int:
        """Where it begins."""
        ...


def region_of(array: np.ndarray | Buffer) -> Region:
    """Where an array lies, which must stay alive and unchanged for as long as that is used."""
    if isinstance(array, np.ndarray):
        return Region(array.ctypes.data, array.nbytes)
    pointer, device = array.unsafe_buffer_pointer(), array.device
    if device.platform == "cpu":
        return Region(pointer, array.nbytes)
    return Region(pointer, array.nbytes, "VRAM", device.local_hardware_id or 0)


class Staging:
    """Where parts lie to be fetched. On one thread."""

    def __init__(self, num_bytes: int):
        self.slots = Slots(num_bytes)
        self._bytes = np.frombuffer(mmap.mmap(-1, num_bytes), np.uint8)
        self.region = region_of(self._bytes)

    def take(self, size: int) -> int | None:
        """A slot of so many bytes, if there is room for it."""
        offset = self.slots.find(size)
        return offset if offset is not None and self.slots.add(offset, size) else None

    def room(self, start: int, stop: int) -> np.ndarray:
        """Bytes to write."""
        return self._bytes[start:stop]

    def give(self, offset: int) -> bool:
        """Whether a slot in use began there; it is free now."""
        return self.slots.remove(offset)


class Landing:
    """Where parts arrive. Slots are cut on one thread, and may come back on any."""

    def __init__(self, num_bytes: int):
        self.slots = Slots(num_bytes)
        self._map = memoryview(mmap.mmap(-1, num_bytes)).toreadonly()
        self.region = region_of(np.frombuffer(self._map, np.uint8))
        self._freed: deque[int] = deque()

    def cut(self, size: int) -> np.ndarray | None:
        """A slot of so many bytes if there is room, in use until nobody holds this array or a view of it."""
        while self._freed:
            self.slots.remove(self._freed.popleft())
        offset = self.slots.find(size)
        if offset is None or not self.slots.add(offset, size):
            return None
        root = np.frombuffer(self._map, np.uint8, size, offset)
        weakref.finalize(root, self._freed.append, offset).atexit = False
        return root


async def write(part: Parts, room: Callable[[int, int], np.ndarray], offset: int) -> None:
    """Copy a part's payload to `room` from `offset` on, and let the loop turn meanwhile."""
    loop = asyncio.get_running_loop()
    turned_at = loop.time()
    for view in parts.views(part):
        source = np.frombuffer(view, np.uint8)
        for start in range(0, len(source), AT_ONCE):
            piece = source[start : start + AT_ONCE]
            np.copyto(room(offset, offset + len(piece)), piece)
            offset += len(piece)
            if (now := loop.time()) - turned_at > TURN_S:
                await asyncio.sleep(0)
                turned_at = now
