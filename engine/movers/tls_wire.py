"""Bytes over one TLS connection, in an asyncio loop: decrypted into place, encrypted as they lie in memory.

    socket --recv--> room --> OpenSSL --records, decrypted--> where the reader wants them
    pieces --> records of 16 KiB, small pieces joined --> OpenSSL --> socket, many records a call

The bytes pass through OpenSSL's memory and not through its own reads of the socket, which would be two calls of the
system for every record. Both directions belong to one loop, whose thread alone calls it.

Cost: beside a plain socket two passes of AES over the bytes and two copies, 0.7 s of processor time for a GB.
"""

import asyncio
import contextlib
import socket
import ssl
from collections import deque

from engine.movers.pipe import ONCE, Pipe, Ready, drop
from engine.movers.tls import Tls, stranger

RECORD = 1 << 14  # most bytes of one TLS record
MOST_SENT = 1 << 38  # bytes under one key: 2**24.5 records of AES-GCM (RFC 8446, 5.5); Python cannot renew it
PARTING_S = 0.5  # for the other side to read why
ROOM = 1 << 18  # bytes of records that are read at once, and written; less is slower


class TlsWire:
    """A socket, and the TLS of what passes through it."""

    local = False

    def __init__(self, connected: socket.socket, tls: Tls, dialing: bool):
        self._socket, self._ready = connected, Ready(connected)
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = tls.over_memory(self._incoming, self._outgoing, dialing)
        self._room = memoryview(bytearray(ROOM))
        self._sent = 0

    async def shake_hands(self) -> None:
        """To be done before all else."""
        try:
            while True:
                try:
                    self._tls.do_handshake()
                except ssl.SSLWantReadError:
                    await self._flush()
                    await self._more()
                else:
                    break
        except ssl.SSLError:
            await self._part()
            raise
        await self._flush()

    async def _part(self) -> None:
        """Send the alert that says why, and let it be read: a close before that may take it back."""
        with contextlib.suppress(OSError):
            async with asyncio.timeout(PARTING_S):
                await self._flush()
                self._socket.shutdown(socket.SHUT_WR)
                while await self._come():
                    pass

    @property
    def tls(self) -> ssl.SSLObject:
        """Who is at the other end."""
        return self._tls

    @property
    def worn(self) -> bool:
        """The key has had its share."""
        return self._sent >= MOST_SENT

    async def receive(self, into: memoryview) -> int:
        """How many bytes came; 0 at the end."""
        into, count = into[:ONCE], 0
        while count < len(into):
            try:
                came = self._tls.read(len(into) - count, into[count:])  # type: ignore[arg-type]
            except ssl.SSLWantReadError:
                if count:
                    break
                await self._more()
            except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
                break
            else:
                count += came
                if came == 0:
                    break
        await self._ready.turn()
        return count

    async def _more(self) -> None:
        """Bytes from the socket, or its end, to OpenSSL."""
        if came := await self._come():
            self._incoming.write(self._room[:came])
        else:
            self._incoming.write_eof()

    async def _come(self) -> int:
        """How many bytes came to the room."""
        while True:
            try:
                return self._socket.recv_into(self._room)
            except BlockingIOError:
                await self._ready.readable()

    async def send(self, pieces: deque[memoryview]) -> None:
        """Send all pieces."""
        while pieces:
            while pieces and self._outgoing.pending < ROOM:
                written = self._tls.write(_next(pieces))
                self._sent += written
                drop(pieces, written)
            await self._flush()

    async def _flush(self) -> None:
        left = memoryview(self._outgoing.read())
        while left:
            try:
                left = left[self._socket.send(left) :]
            except BlockingIOError:
                await self._ready.writable()
            except ConnectionError:
                self._read_alert()
                raise
        await self._ready.turn()

    def _read_alert(self) -> None:
        """The other side has ended: raise the SSLError whose alert it may have left."""
        with contextlib.suppress(BlockingIOError, ConnectionError):
            self._incoming.write(self._room[: self._socket.recv_into(self._room)])
            with contextlib.suppress(ssl.SSLWantReadError):
                self._tls.read(1)

    def close(self) -> None:
        """At once."""
        self._ready.close()


async def secure(connected: socket.socket, tls: Tls, dialing: bool) -> Pipe:
    """A pipe over TLS to a peer whose role fits. Raises Stranger, EOFError or OSError, and has closed it then."""
    try:
        wire = TlsWire(connected, tls, dialing)
        await wire.shake_hands()
        tls.check(wire.tls, dialing)
    except BaseException as error:
        connected.close()
        if isinstance(error, ssl.SSLError):
            raise stranger(error) from None
        raise
    return Pipe(wire)


def _next(pieces: deque[memoryview]) -> memoryview:
    """The first bytes of `pieces`: of a large one as they lie, small ones joined to a record."""
    if len(pieces[0]) >= RECORD or len(pieces) == 1:
        return pieces[0][:ROOM]
    joined, size = [], 0
    for piece in pieces:
        joined.append(piece[: RECORD - size])
        size += len(joined[-1])
        if size == RECORD:
            break
    return memoryview(b"".join(joined))
