"""The floor of a move by NIXL: the receiver reads what the sender holds registered, and a word that it is there.

    sender   its agent's metadata, once --> 16 bytes: where -->  turns of its agent until --one byte--> the next
    receiver meets it                       reads that            into registered memory, warm

Nothing is copied beside what the library does, and no event loop and no other thread is between. One part is on its
way at a time: a read within a host is one call, which copies.
"""

import importlib.util
import socket
from concurrent.futures import Future

import numpy as np

from engine.movers import addresses
from engine.movers.nixl import Agent, Read, library, quiet
from engine.movers.pull import PLACE
from engine.movers.staging import Landing, Region, Staging

DEVICES = "lo"
LIMIT_S = 60.0
WAIT_S = 1e-4


def installed() -> bool:
    """Whether there is something to measure."""
    return importlib.util.find_spec("nixl") is not None


def pulled(listener: socket.socket, size: int) -> None:
    """Read what the one that connects says, part after part."""
    landing = Landing(size)
    into = landing.cut(size)
    assert into is not None
    with quiet():
        agent = Agent(library(), DEVICES)
    agent.register(landing.region)
    listener.setblocking(True)
    with listener.accept()[0] as come:
        (length,) = come.recv(1)
        peer = agent.meet(come.recv(length << 6, socket.MSG_WAITALL).rstrip(b"\0"))
        while where := come.recv(PLACE.size, socket.MSG_WAITALL):
            done: Future[None] = Future()
            agent.begin(Region(*PLACE.unpack(where)), Read(peer, into, done, LIMIT_S))
            while not done.done():
                agent.turn()
            done.result()
            come.sendall(b"x")


class BareNixl:
    """Bytes by NIXL, on the caller's thread."""

    def __init__(self, address: str, size: int):
        self._staging = Staging(size)
        self._staging.room(0, size)[:] = np.uint8(1)
        self._region = self._staging.region
        with quiet():
            self._agent = Agent(library(), DEVICES)
        metadata = self._agent.register(self._region)
        self._agent.watched = 1
        found = addresses.parse(address)
        self._socket = socket.create_connection((found.host, found.port))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        length = -(-len(metadata) >> 6)
        self._socket.sendall(bytes([length]) + metadata.ljust(length << 6, b"\0"))
        self._socket.settimeout(WAIT_S)

    def run(self, count: int) -> None:
        """Move them `count` times."""
        for _ in range(count):
            self._socket.sendall(PLACE.pack(self._region.address, self._region.num_bytes))
            while not self._there():
                self._agent.turn()

    def _there(self) -> bool:
        try:
            return self._socket.recv(1) == b"x"
        except TimeoutError:
            return False

    def close(self) -> None:
        """End it."""
        self._socket.close()
