"""What the ends of a bulk connection within one host say about shared memory, so that KV does not cross the socket.

    reader                                                writer
      Want ------------------------------------------>
      maps it, or says Want no  <---------------------  Lend(size) + descriptor: once, before its first part
      checksums of the bytes where they lie, an array  <-- Placed(offset, size, header): the part was copied there
      Freed(offsets) -------------------------------->  once nobody holds these arrays; batched

Each direction has memory of its own, which belongs to the connection and ends with it; arrays stay readable. Who
never says Want gets the payload through the socket, as over TCP. When no slot is free the writer waits as long as
the socket would take, and sends the part through it then: a reader that holds slots for long stalls nobody.

Cost: one copy, at the writer; over sockets there are two, in and out of the kernel.
"""

import asyncio
import contextlib
import struct
from collections import Counter

from engine.core.handoff import Parts
from engine.errors import Malformed
from engine.movers import parts
from engine.movers.arena import MOST_SLOTS, Arena, Borrowed, available
from engine.movers.frames import frame
from engine.movers.geometry import Geometry
from engine.movers.staging import write

WANT, LEND, PLACED, FREED = KINDS = 81, 82, 83, 84
SIZE, PLACE = struct.Struct("<Q"), struct.Struct("<QQ")
SOCKET_RATE = float(1 << 30)  # bytes a second
ASKED_S = 1.0  # most that a first part waits for the other side to say that it wants memory


class Shared:
    """Of one connection, on its loop. `most_bytes` 0: nothing of ours is lent."""

    def __init__(self, most_bytes: int, geometry: Geometry | None, counts: Counter[str]):
        self._most, self._geometry, self._counts = most_bytes, geometry, counts
        self._loop = asyncio.get_running_loop()
        self.arena: Arena | None = None
        self.borrowed: Borrowed | None = None
        self._wanted, self._asked = False, asyncio.Event()  # by the other side
        self._hopeful = True  # a slot was freed since we last waited in vain
        self._room, self._due = asyncio.Event(), asyncio.Event()
        self._wants = [frame(WANT, b"\1" if available() else b"\0")] if geometry is not None else []
        self._stirred = False
        self._declined = False

    # -- what is heard ------------------------------------------------------------------------------------------

    def heard(self, kind: int, header: bytes, descriptor: int | None) -> parts.Intake | None:
        """Take a frame of ours, and what came with it; the part, where it is one. Raises Malformed."""
        if self._geometry is None and kind in (LEND, PLACED):
            raise Malformed("parts: got KV where no lane is")
        try:
            if kind == PLACED:
                return self._placed(*PLACE.unpack_from(header), header[PLACE.size :])
            if kind == WANT:
                self._want(header)
            elif kind == LEND:
                self._borrow(*SIZE.unpack(header), descriptor)
            else:
                self._give([offset for (offset,) in SIZE.iter_unpack(header)])
        except struct.error:
            raise Malformed("shared: got a header of another length") from None
        return None

    def _want(self, header: bytes) -> None:
        self._wanted = header == b"\1"
        self._asked.set()
        if not self._wanted and self._most:
            self.stop_lending()

    def _borrow(self, size: int, descriptor: int | None) -> None:
        if self.borrowed is not None or self._declined or not available():
            raise Malformed("shared: got memory a second time, or unasked")
        try:
            if descriptor is None:
                raise OSError("it was lost on the way")
            self.borrowed = Borrowed(descriptor, size, self._stir)
        except OSError:
            self._declined = True
            self._counts["unmapped"] += 1
            self._wants.append(frame(WANT, b"\0"))
            self._due.set()

    def _placed(self, offset: int, size: int, header: bytes) -> parts.Intake:
        assert self._geometry is not None
        about = parts.read_header(header, size)
        if self.borrowed is None:
            if not self._declined:
                raise Malformed("shared: got a part in memory that was never lent")
            return parts.Intake(about, 0, self._geometry)  # fits nothing: the core asks again
        return parts.Intake(about, size, self._geometry, self.borrowed.cut(offset, size))

    def _give(self, offsets: list[int]) -> None:
        if self.arena is None or len(offsets) > MOST_SLOTS:
            raise Malformed("shared: got slots as free that were not lent")
        for offset in offsets:
            self.arena.give(offset)
        self._hopeful = True
        self._room.set()

    # -- what is said -------------------------------------------------------------------------------------------

    async def said(self) -> list[bytes]:
        """Wait until there is something to say; the frames."""
        while not self._wants and not (self.borrowed is not None and self.borrowed.pending):
            await self._due.wait()
            self._due.clear()
            self._stirred = False
        said, self._wants = self._wants, []
        if self.borrowed is not None and (freed := self.borrowed.freed()):
            said.append(frame(FREED, b"".join(map(SIZE.pack, freed))))
        return said

    def _stir(self) -> None:
        """A slot is free; called anywhere, so without a lock."""
        if not self._stirred:
            self._stirred = True
            with contextlib.suppress(RuntimeError):  # the loop has ended, and with it the connection
                self._loop.call_soon_threadsafe(self._due.set)

    # -- what is lent -------------------------------------------------------------------------------------------

    async def lend(self) -> tuple[bytes, int] | None:
        """A frame and the descriptor that goes with it, where it is time for that."""
        if not self._most or self.arena is not None:
            return None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(ASKED_S):
                await self._asked.wait()
        self._asked.set()
        if not self._wanted or not self._most:
            return None
        try:
            self.arena = Arena(self._most)
        except OSError:
            self.stop_lending()
            return None
        return frame(LEND, SIZE.pack(self._most)), self.arena.descriptor

    def stop_lending(self) -> None:
        """Sockets from now on."""
        self._counts["unlent"] += 1
        self._most = 0
        if self.arena is not None:
            self.arena.close()
        self.arena = None

    async def place(self, part: Parts, header: bytes) -> bytes | None:
        """The frame that says where `part` lies from now on; None where it has to go through the socket."""
        size = parts.num_bytes(part)
        arena = self.arena
        if arena is None or not size:
            return None
        offset = await self._take(arena, size)
        if offset is not None:
            try:
                await self._copy(part, arena, offset)
            except OSError:  # no memory for more pages
                arena.give(offset)
            else:
                self._counts["shared"] += 1
                return frame(PLACED, PLACE.pack(offset, size) + header)
        self._counts["unshared"] += 1
        return None

    async def _take(self, arena: Arena, size: int) -> int | None:
        offset = arena.take(size)
        if offset is None and self._hopeful and size <= arena.slots.num_bytes:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(size / SOCKET_RATE):
                    while offset is None:
                        self._room.clear()
                        await self._room.wait()
                        offset = arena.take(size)
            self._hopeful = offset is not None
        return offset

    async def _copy(self, part: Parts, arena: Arena, offset: int) -> None:
        await write(part, arena.room, offset)

    def close(self) -> None:
        """Let go of both segments; arrays that somebody holds stay readable."""
        if self.arena is not None:
            self.arena.close()
        self.arena = self.borrowed = None
        self._most = 0
        self._asked.set()
