"""A connection between the leader of a lane and one follower: orders one way, answers the other.

    say (any thread) --> socket ~~~~> receive (one thread)          silence, an end, nonsense: GroupLost

Neither side waits for the other but for bytes. Both say at least a Beat every BEAT_S from a thread of their own, so
a process that is stopped, hung or cut off is noticed after about SILENT * BEAT_S, whatever its device does; while
this process itself was stopped nobody's silence counts, as turns are counted and not seconds.
Plain on loopback; whoever makes the socket has greeted and, beyond loopback, wrapped it in TLS.
"""

import contextlib
import select
import socket
import ssl
import threading
import time
from typing import NamedTuple

from engine.errors import GroupLost, Malformed
from engine.movers.frames import PREFIX, check_header, read_prefix
from engine.observe.plan_bytes import MAX_BYTES
from engine.replica.orders import Beat, from_frame, to_frame

BEAT_S = 0.5
SILENT = 6  # turns of BEAT_S without a byte
STUCK_S = 5.0  # the other side reads nothing for so long
ROOM = 1 << 20  # bytes


class Channel:
    """To `peer`, over a connected socket that is this object's from now on."""

    def __init__(self, connected: socket.socket, peer: str):
        self.peer = peer
        self._socket, self._lock = connected, threading.Lock()
        self._data = bytearray()
        self._over = threading.Event()
        connected.setblocking(False)
        with contextlib.suppress(OSError):  # a unix socket has no such option
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        threading.Thread(target=self._beat, name=f"beats to {peer}", daemon=True).start()

    def say(self, order: NamedTuple) -> None:
        """Send it; orders arrive in the order of calls. Where that fails the channel ends, as `receive` tells."""
        self.send(to_frame(order))

    def send(self, data: bytes) -> None:
        """Send the bytes of whole frames."""
        left, until = memoryview(data), 0.0
        with self._lock:
            try:
                while left:
                    try:
                        left, until = left[self._socket.send(left) :], 0.0
                    except (BlockingIOError, ssl.SSLWantWriteError, ssl.SSLWantReadError):
                        until = until or time.monotonic() + STUCK_S
                        if time.monotonic() > until:
                            raise
                        select.select([], [self._socket], [], BEAT_S)
            except (OSError, ValueError):
                self._shut()

    def receive(self) -> object:
        """The next order or answer that is no Beat. Raises GroupLost, and has ended the channel then."""
        try:
            return self._next()
        except GroupLost:
            self.free()
            raise

    def _next(self) -> object:
        while True:
            try:
                prefix = read_prefix(self._take(PREFIX), MAX_BYTES, 0)
                header = self._take(prefix.header)
                check_header(prefix, header)
                found = from_frame(prefix.kind, header)
            except Malformed as error:
                raise GroupLost(f"{self.peer} said what is no order of this lane: {error}") from None
            if not isinstance(found, Beat):
                return found

    def close(self) -> None:
        """End it; whoever receives finds it gone."""
        with self._lock:
            self._shut()

    def free(self) -> None:
        """End it where nobody receives, or nobody else."""
        with self._lock:
            self._shut()
            self._socket.close()

    def _shut(self) -> None:
        self._over.set()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def _take(self, count: int) -> bytes:
        silent = 0
        while len(self._data) < count:
            silent = 0 if self._read() else silent + 1
            if silent >= SILENT:
                raise GroupLost(f"{self.peer} has said nothing for {SILENT * BEAT_S:.0f} s")
        found = bytes(self._data[:count])
        del self._data[:count]
        return found

    def _read(self) -> bool:
        """Whether bytes came within a turn. Raises GroupLost at the end."""
        try:
            pending = isinstance(self._socket, ssl.SSLSocket) and self._socket.pending()
            if not pending and not select.select([self._socket], [], [], BEAT_S)[0]:
                return False
            with self._lock:  # a TLS connection may not be read and written at once
                data = self._socket.recv(ROOM)
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return True  # bytes that are not a whole record of TLS yet
        except (OSError, ValueError) as error:
            raise GroupLost(f"{self.peer} is gone ({type(error).__name__})") from None
        if not data:
            raise GroupLost(f"{self.peer} has ended")
        self._data += data
        return True

    def _beat(self) -> None:
        data = to_frame(Beat())
        while not self._over.wait(BEAT_S):
            self.send(data)
