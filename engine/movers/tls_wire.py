"""Bytes over one TLS connection, in an asyncio loop: decrypted into place, encrypted as they lie in memory.

    socket --records of at most 16 KiB--> OpenSSL --recv_into--> where the reader wants them
    pieces --> small ones joined to a record, large ones as they are --> OpenSSL --> socket

OpenSSL works on the socket itself, so that no bytes pass through buffers of ours; a record that could not be sent
has to be offered to it again as it was. Both directions belong to one loop, whose thread alone calls it.
"""

import socket
import ssl
from collections import deque

from engine.movers.pipe import ONCE, Pipe, Ready, drop
from engine.movers.tls import Tls, stranger

RECORD = 1 << 14  # most bytes of one TLS record


class TlsWire:
    """A TLS socket whose handshake is over."""

    local = False

    def __init__(self, connected: ssl.SSLSocket, ready: Ready):
        self._socket, self._ready = connected, ready

    async def receive(self, into: memoryview) -> int:
        """How many bytes came; 0 at the end."""
        into, count = into[:ONCE], 0
        while count < len(into):
            try:
                came = self._socket.recv_into(into[count:])
            except ssl.SSLWantReadError:
                if count:
                    break
                await self._ready.readable()
            except ssl.SSLWantWriteError:
                await self._ready.writable()
            else:
                count += came
                if came < RECORD:  # the end, or of what was sent together
                    break
        await self._ready.turn()
        return count

    async def send(self, pieces: deque[memoryview]) -> None:
        """Send all pieces."""
        while pieces:
            record = _record(pieces)
            left = record
            while left:
                try:
                    left = left[self._socket.send(left) :]
                except ssl.SSLWantWriteError:
                    await self._ready.writable()
                except ssl.SSLWantReadError:
                    await self._ready.readable()
                else:
                    await self._ready.turn()
            drop(pieces, len(record))

    def close(self) -> None:
        """At once."""
        self._ready.close()


async def secure(connected: socket.socket, tls: Tls, dialing: bool) -> Pipe:
    """A pipe over TLS to a peer whose role fits. Raises Stranger, EOFError or OSError, and has closed it then."""
    wrapped = ready = None
    try:
        connected.setblocking(False)
        wrapped = tls.begin(connected, dialing)
        ready = Ready(wrapped)
        await _shake_hands(wrapped, ready)
        tls.check(wrapped, dialing)
    except BaseException as error:
        (ready or wrapped or connected).close()
        if isinstance(error, ssl.SSLError):
            raise stranger(error) from None
        raise
    return Pipe(TlsWire(wrapped, ready))


async def _shake_hands(wrapped: ssl.SSLSocket, ready: Ready) -> None:
    while True:
        try:
            wrapped.do_handshake()
        except ssl.SSLWantReadError:
            await ready.readable()
        except ssl.SSLWantWriteError:
            await ready.writable()
        else:
            return


def _record(pieces: deque[memoryview]) -> memoryview:
    """The first bytes of `pieces`: of a large one as they lie, small ones joined as far as a record goes."""
    first = pieces[0]
    if len(first) >= RECORD or len(pieces) == 1:
        return first[:ONCE]
    joined, size = [], 0
    for piece in pieces:
        joined.append(piece[: RECORD - size])
        size += len(joined[-1])
        if size == RECORD:
            break
    return memoryview(b"".join(joined))
