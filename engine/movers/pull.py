"""What the ends of a bulk connection say so that a library moves the KV: the receiver pulls it out of the sender.

    receiver                                              sender
      Want(version) ------------------------------------->
      meets that agent, or says Want no  <---------------  Offer(region, metadata): once, before its first part
      pulls it into memory of its own    <---------------  Placed(offset, size, header): the part was copied there
      Done(offset) -------------------------------------->  the slot is free
      Refused(offset) ----------------------------------->  the part goes through the socket, and then it is free

Tickets, generations, checksums, order and losses are those of every connection. The receiver pulls and the sender
never pushes: nothing lands that was not asked for, no address of the receiver is told to anybody, and what is late
disturbs the one that gave it up alone. Within a host a push is as fast (README.md).
A pull that fails or takes too long is refused, and everything after it goes through the socket until the connection
is a new one. Who never says Want is sent nothing by this way, after one wait of ASKED_S.

Cost: two copies, the sender's to its staging and the library's; a socket has two as well, and the kernel's work.
"""

import asyncio
import contextlib
import struct
from collections import Counter, deque
from typing import Protocol

import numpy as np

from engine.core.handoff import Parts
from engine.errors import Malformed
from engine.movers import parts
from engine.movers.arena import ALIGNED, MOST_BYTES, MOST_SLOTS
from engine.movers.frames import frame
from engine.movers.geometry import Geometry
from engine.movers.staging import Landing, Region, Staging, write

WANT, OFFER, PLACED, DONE, REFUSED = KINDS = 85, 86, 87, 88, 89
PLACE, OFFSET, ABOUT = struct.Struct("<QQ"), struct.Struct("<Q"), struct.Struct("<QQBH")
MEMORIES = "DRAM", "VRAM"
MOST_METADATA = 1 << 16  # bytes
ASKED_S = 1.0  # most that a first part waits for the other side to say that it wants to pull
PULL_S = 1.0  # that a pull may take, beyond its bytes; in sum shorter than the silence that ends a connection
LEAST_RATE = float(256 << 20)  # bytes a second
SOCKET_RATE = float(1 << 30)


class Mover(Protocol):
    """One agent of a library, for all connections of a process (engine/movers/nixl.py). It outlives them."""

    version: bytes
    metadata: bytes
    staging: Staging
    landing: Landing

    async def meet(self, metadata: bytes) -> bytes:
        """The name of another agent, which may be read from now on. Raises OSError."""
        ...

    def forget(self, peer: bytes) -> None:
        """Read from it no more, once for each `meet`."""
        ...

    async def read(self, peer: bytes, source: Region, into: np.ndarray, limit_s: float) -> None:
        """Fill `into`, held until nothing can write it any more. Raises OSError, TimeoutError past the limit."""
        ...

    def watch(self, change: int) -> None:
        """So many more parts of ours may be read by others now: until they are, the library needs turns."""
        ...

    def close(self) -> None:
        """End it; nothing is read or written any more."""
        ...


class Pull:
    """Of one connection, on its loop."""

    def __init__(self, mover: Mover, geometry: Geometry | None, counts: Counter[str]):
        self._mover, self._geometry, self._counts = mover, geometry, counts
        self._says: list[bytes] = [frame(WANT, mover.version)] if geometry is not None else []
        self._due, self._room = asyncio.Event(), asyncio.Event()
        self._asked, self._wanted = asyncio.Event(), False  # by the other side
        self._offered = self._declined = False
        self._hopeful = True  # a slot was freed since we last waited in vain
        self._peer: bytes | None = None
        self._source: Region | None = None
        self._placed: dict[int, tuple[int, bytes]] = {}  # slots: size, and header of the part
        self._owed: deque[int] = deque()  # slots whose part the socket must take
        self._paid: int | None = None  # the slot whose part it took last

    # -- what is heard ------------------------------------------------------------------------------------------

    async def heard(self, kind: int, header: bytes) -> parts.Intake | None:
        """Take a frame of ours; the part, where one was pulled. Raises Malformed."""
        if self._geometry is None and kind in (OFFER, PLACED):
            raise Malformed("parts: got KV where no lane is")
        try:
            if kind == PLACED:
                return await self._pull(*PLACE.unpack_from(header), header[PLACE.size :])
            if kind == OFFER:
                await self._meet(*ABOUT.unpack_from(header), header[ABOUT.size :])
            elif kind == WANT:
                self._want(header)
            else:
                self._answered(kind, [offset for (offset,) in OFFSET.iter_unpack(header)])
        except struct.error:
            raise Malformed("pull: got a header of another length") from None
        return None

    def _want(self, version: bytes) -> None:
        self._wanted = version == self._mover.version
        self._asked.set()
        if not self._wanted:
            self._counts["unoffered"] += 1

    async def _meet(self, address: int, num_bytes: int, memory: int, device: int, metadata: bytes) -> None:
        if self._source is not None:
            raise Malformed("pull: got an offer a second time")
        if memory >= len(MEMORIES) or not 0 < num_bytes <= MOST_BYTES or address + num_bytes >= 1 << 64:
            raise Malformed("pull: got memory that cannot be")
        if len(metadata) > MOST_METADATA:
            raise Malformed(f"pull: got {len(metadata)} bytes of metadata; expected at most {MOST_METADATA}")
        self._source = Region(address, num_bytes, MEMORIES[memory], device)
        try:
            self._peer = await self._mover.meet(metadata)
        except OSError:
            self._decline("unmet")

    def _decline(self, count: str) -> None:
        self._counts[count] += 1
        self._declined = True
        self._say(WANT, b"")

    async def _pull(self, offset: int, size: int, header: bytes) -> parts.Intake | None:
        assert self._geometry is not None
        if self._source is None:
            raise Malformed("pull: got a part in memory that was never offered")
        if offset % ALIGNED or not 0 < size <= self._source.num_bytes - offset:
            raise Malformed("pull: got a slot out of bounds or not aligned")
        about = parts.read_header(header, size)
        if await self._fetched(offset, into := self._landing(size)):
            self._say(DONE, OFFSET.pack(offset))
            return parts.Intake(about, size, self._geometry, into)
        self._say(REFUSED, OFFSET.pack(offset))
        return None

    def _landing(self, size: int) -> np.ndarray | None:
        if self._declined or self._peer is None:
            return None
        if (into := self._mover.landing.cut(size)) is None:
            self._counts["unlanded"] += 1
        return into

    async def _fetched(self, offset: int, into: np.ndarray | None) -> bool:
        if into is None or self._peer is None or self._source is None:
            return False
        source = self._source._replace(address=self._source.address + offset, num_bytes=len(into))
        try:
            await self._mover.read(self._peer, source, into, PULL_S + len(into) / LEAST_RATE)
        except OSError:
            self._decline("unread")
            return False
        return True

    def _answered(self, kind: int, offsets: list[int]) -> None:
        if len(offsets) > MOST_SLOTS:
            raise Malformed("pull: got more slots than there are")
        for offset in offsets:
            if offset not in self._placed or offset in self._owed or offset == self._paid:
                raise Malformed("pull: got an answer about a slot that is not in use")
            if kind == DONE:
                self._counts["pulled"] += 1
                self._give(offset)
            else:
                self._counts["unpulled"] += 1
                self._owed.append(offset)
                self._due.set()

    def _give(self, offset: int) -> None:
        del self._placed[offset]
        self._mover.staging.give(offset)
        self._mover.watch(-1)
        self._hopeful = True
        self._room.set()

    # -- what is said -------------------------------------------------------------------------------------------

    def _say(self, kind: int, header: bytes) -> None:
        self._says.append(frame(kind, header))
        self._due.set()

    async def said(self) -> list[bytes | memoryview]:
        """Wait until there is something to say; the frames, and what else the socket must take.

        What it returned last has been sent when it is called again.
        """
        if self._paid is not None:
            paid, self._paid = self._paid, None
            self._give(paid)
        while not self._says and not self._owed:
            await self._due.wait()
            self._due.clear()
        said: list[bytes | memoryview] = [*self._says]
        self._says.clear()
        if self._owed:
            self._paid = offset = self._owed.popleft()
            size, header = self._placed[offset]
            room = self._mover.staging.room(offset, offset + size)
            said += [frame(parts.KIND, header, size), memoryview(room)]
        return said

    # -- what is offered ----------------------------------------------------------------------------------------

    async def place(self, part: Parts, header: bytes) -> list[bytes]:
        """The frames that say where `part` lies from now on; none where it has to go another way."""
        size = parts.num_bytes(part)
        if not size or not await self._is_wanted():
            return []
        if (offset := await self._take(size)) is None:
            self._counts["unpulled"] += 1
            return []
        if not self._wanted:  # any more
            self._mover.staging.give(offset)
            return []
        self._placed[offset] = size, header
        self._mover.watch(1)
        await write(part, self._mover.staging.room, offset)
        placed = frame(PLACED, PLACE.pack(offset, size) + header)
        return [placed] if self._offered else [self._offer(), placed]

    async def _is_wanted(self) -> bool:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(ASKED_S):
                await self._asked.wait()
        self._asked.set()
        return self._wanted

    def _offer(self) -> bytes:
        self._offered = True
        address, num_bytes, memory, device = self._mover.staging.region
        about = ABOUT.pack(address, num_bytes, MEMORIES.index(memory), device)
        return frame(OFFER, about + self._mover.metadata)

    async def _take(self, size: int) -> int | None:
        staging = self._mover.staging
        offset = staging.take(size)
        if offset is None and self._hopeful and size <= staging.slots.num_bytes:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(size / SOCKET_RATE):
                    while offset is None:
                        self._room.clear()
                        await self._room.wait()
                        offset = staging.take(size)
            self._hopeful = offset is not None
        return offset

    def close(self) -> None:
        """Let go of the other side; what was pulled stays readable."""
        for offset in list(self._placed):
            self._give(offset)
        self._owed.clear()
        self._wanted, self._paid = False, None
        self._asked.set()
        if self._peer is not None:
            self._mover.forget(self._peer)
        self._peer, self._declined = None, True
