"""Bytes over one connection, in an asyncio loop: received straight into place, sent as they lie in memory.

    socket --recv_into--> read-ahead buffer --> small reads          large reads go straight to their place
    sendmsg <-- views of many pieces                                  nothing is joined

Over TLS the same through engine/movers/tls_wire.py. Whoever reads says how long it may take; a send that moves
nothing for STUCK_S raises TimeoutError. The end of the other side is EOFError.
"""

import asyncio
import os
import socket
import sys
from collections import deque
from collections.abc import Callable, Iterable
from typing import Protocol

AHEAD = 1 << 14  # bytes read before they are asked for
ONCE = 1 << 20  # most bytes of one call, so that a loop turns
PIECES = 256  # most pieces of one call
STUCK_S = 10.0
TURN_S = 0.001
RIGHTS = socket.CMSG_SPACE(4)  # bytes of one descriptor beside the others
CLOSED_ON_EXEC = getattr(socket, "MSG_CMSG_CLOEXEC", 0)  # not on every system


class Wire(Protocol):
    """What moves bytes.

    local   both ends are of one host and may hand descriptors to each other
    worn    as much was sent as should be over one connection
    """

    local: bool

    @property
    def worn(self) -> bool: ...

    async def receive(self, into: memoryview) -> int:
        """How many bytes came, at least 1; 0 when the other side has ended."""
        ...

    async def send(self, pieces: deque[memoryview]) -> None:
        """Send all pieces."""
        ...

    def close(self) -> None:
        """At once; what is on its way may be lost."""
        ...


class Ready:
    """A socket that never blocks, and the waits of a loop for it."""

    def __init__(self, connected: socket.socket):
        connected.setblocking(False)
        if connected.family != socket.AF_UNIX:
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._socket = connected
        self._loop = asyncio.get_running_loop()
        self._waiting: set[asyncio.Future] = set()
        self._turned_at = 0.0

    async def turn(self) -> None:
        """Let the loop turn now and then: while there is always more, no call ever waits."""
        if (now := self._loop.time()) - self._turned_at > TURN_S:
            self._turned_at = now
            await asyncio.sleep(0)

    async def readable(self) -> None:
        """Wait until there is something to read."""
        await self._until(self._loop.add_reader, self._loop.remove_reader)

    async def writable(self) -> None:
        """Wait until there is room, at most STUCK_S."""
        async with asyncio.timeout(STUCK_S):
            await self._until(self._loop.add_writer, self._loop.remove_writer)

    async def _until(self, add: Callable, remove: Callable) -> None:
        descriptor, waiting = self._socket.fileno(), self._loop.create_future()
        add(descriptor, _settle, waiting)
        self._waiting.add(waiting)
        try:
            await waiting
        finally:
            self._waiting.discard(waiting)
            if self._socket.fileno() >= 0:
                remove(descriptor)

    def close(self) -> None:
        """At once."""
        if (descriptor := self._socket.fileno()) >= 0:
            self._loop.remove_reader(descriptor)
            self._loop.remove_writer(descriptor)
            self._socket.close()
        for waiting in self._waiting:
            _settle(waiting)  # the next call finds the socket closed


class PlainWire:
    """A socket as it is."""

    worn = False

    def __init__(self, connected: socket.socket):
        self.local = connected.family == socket.AF_UNIX
        self._socket, self._ready = connected, Ready(connected)
        self._loop = asyncio.get_running_loop()
        self._handed: int | None = None

    async def receive(self, into: memoryview) -> int:
        """How many bytes came; 0 at the end."""
        if self.local:
            count = await self._receive_local(into[:ONCE])
        else:
            count = await self._loop.sock_recv_into(self._socket, into[:ONCE])
        await self._ready.turn()
        return count

    async def _receive_local(self, into: memoryview) -> int:
        """Takes a descriptor that comes along, which the plain call would drop."""
        while True:
            try:
                count, beside, _, _ = self._socket.recvmsg_into([into], RIGHTS, CLOSED_ON_EXEC)
            except BlockingIOError:
                await self._ready.readable()
                continue
            for level, kind, data in beside:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    self._take_handed(data)
            return count

    def handed(self) -> int | None:
        """The descriptor that came last, which is the caller's now."""
        found, self._handed = self._handed, None
        return found

    def _take_handed(self, data: bytes) -> None:
        """Keep the last and no other, whatever somebody sends; where there was room for one, two may have come."""
        for start in range(0, len(data) - 3, 4):
            self._drop_handed()
            self._handed = int.from_bytes(data[start : start + 4], sys.byteorder)

    def _drop_handed(self) -> None:
        if (left := self.handed()) is not None:
            os.close(left)

    async def hand(self, data: bytes, descriptor: int) -> bool:
        """Send bytes with a descriptor beside the first; False, and nothing sent, where the system refuses."""
        beside = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptor.to_bytes(4, sys.byteorder))]
        while True:
            try:
                sent = self._socket.sendmsg([data], beside)
            except BlockingIOError:
                await self._ready.writable()
            except OSError:
                return False
            else:
                break
        await self.send(deque([memoryview(data)[sent:]] if sent < len(data) else []))
        return True

    async def send(self, pieces: deque[memoryview]) -> None:
        """Send all pieces."""
        while pieces:
            try:
                sent = self._socket.sendmsg(some(pieces))
            except BlockingIOError:
                await self._ready.writable()
                continue
            drop(pieces, sent)
            await self._ready.turn()

    def close(self) -> None:
        """At once."""
        self._ready.close()
        self._drop_handed()


class Pipe:
    """One connection. One task reads, one writes."""

    def __init__(self, wire: Wire):
        self._wire = wire
        self.local = wire.local
        self._ahead = memoryview(bytearray(AHEAD))
        self._start = self._stop = 0
        self.closed = False
        self.received = 0  # bytes

    @property
    def worn(self) -> bool:
        """Another connection should carry what comes next."""
        return self._wire.worn

    async def some(self) -> None:
        """Wait until there is something to read."""
        if self._start == self._stop:
            self._start, self._stop = 0, await self._wire.receive(self._ahead)
            if self._stop == 0:
                raise EOFError("the other side has ended")
            self.received += self._stop

    async def fill(self, into: memoryview) -> None:
        """Read exactly `into`."""
        done = 0
        while done < len(into):
            left = len(into) - done
            if self._start < self._stop:
                took = min(left, self._stop - self._start)
                into[done : done + took] = self._ahead[self._start : self._start + took]
                self._start += took
            elif left < AHEAD:
                await self.some()
                continue
            elif (took := await self._wire.receive(into[done:])) == 0:
                raise EOFError("the other side has ended")
            else:
                self.received += took
            done += took

    async def skip(self, count: int) -> None:
        """Read `count` bytes and keep none."""
        scratch = memoryview(bytearray(min(count, ONCE)))
        while count > 0:
            await self.fill(scratch[:count])
            count -= len(scratch)

    async def take(self, count: int) -> bytearray:
        """Exactly `count` bytes."""
        found = bytearray(count)
        await self.fill(memoryview(found))
        return found

    async def send(self, pieces: Iterable[bytes | memoryview]) -> None:
        """Send all pieces, in order."""
        await self._wire.send(deque(memoryview(piece) for piece in pieces if len(piece)))

    async def hand(self, data: bytes, descriptor: int) -> bool:
        """Send bytes with a descriptor; False, and nothing sent, where that cannot be."""
        return isinstance(self._wire, PlainWire) and self.local and await self._wire.hand(data, descriptor)

    def handed(self) -> int | None:
        """A descriptor that came with what was read last; the caller closes it."""
        return self._wire.handed() if isinstance(self._wire, PlainWire) else None

    def close(self) -> None:
        """At once; who waits for it fails."""
        if not self.closed:
            self.closed = True
            self._wire.close()


def some(pieces: deque[memoryview]) -> list[memoryview]:
    """The first pieces, so many that one call takes them."""
    batch, size = [], 0
    for piece in pieces:
        batch.append(piece[: ONCE - size])
        size += len(batch[-1])
        if size >= ONCE or len(batch) == PIECES:
            break
    return batch


def drop(pieces: deque[memoryview], sent: int) -> None:
    """Without their first `sent` bytes."""
    while pieces and sent >= len(pieces[0]):
        sent -= len(pieces.popleft())
    if sent:
        pieces[0] = pieces[0][sent:]


def _settle(future: asyncio.Future) -> None:
    if not future.done():
        future.set_result(None)
