"""Ends of links for tests of what carries KV between them, and a mover that needs no library."""

import ctypes
import queue
import time

import numpy as np
from drawn_messages import GEOMETRY, same

from engine.core.handoff import Parts
from engine.movers.links import Links
from engine.movers.parts import Heads
from engine.movers.staging import Landing, Staging

SECRET = bytes(range(32))
ROOM = 1 << 16


class Memory:
    """Agents of one process that read each other's memory by address. `meets` is what all of them know.

    fails    the error of the reads to come
    changes  called with the address before a read
    """

    version = b"memory 1"

    def __init__(self, meets, num_bytes=ROOM):
        self.staging, self.landing = Staging(num_bytes), Landing(num_bytes)
        self.metadata = f"agent {len(meets)}".encode()
        self._meets = meets
        self._meets.add(self.metadata)
        self.known, self.watched, self.fails, self.changes = [], 0, None, lambda address: None

    async def meet(self, metadata):
        if metadata not in self._meets:
            raise OSError("nobody of that name")
        self.known.append(metadata)
        return metadata

    def forget(self, peer):
        self.known.remove(peer)

    async def read(self, peer, source, into, limit_s):
        if self.fails is not None:
            raise self.fails
        assert peer in self.known and source.num_bytes == len(into) and limit_s < 3
        self.changes(source.address)
        ctypes.memmove(into.ctypes.data, source.address, len(into))

    def watch(self, change):
        self.watched += change

    def close(self):
        """Nothing to end."""


class End:
    """Links at an address, with what they heard."""

    def __init__(self, name, listen, limits=None, mover=None):
        self.heard, self.name, self.mover = queue.Queue(), name, mover
        self.links = Links(
            name,
            SECRET,
            lambda *heard: self.heard.put(heard),
            lambda peer: None,
            GEOMETRY,
            limits=limits,
            mover=mover,
        )
        self.links.start([listen])

    def get(self, timeout=10):
        return self.heard.get(timeout=timeout)[1]

    @property
    def counts(self):
        return self.links.counts

    def close(self):
        self.links.close()
        if self.mover is not None:
            self.mover.close()


def part(number, blocks=8):
    """`blocks` times 1024 bytes."""
    rng = np.random.default_rng(number)
    arrays = (rng.integers(0, 1 << 15, GEOMETRY.shape(blocks), np.uint16).view(np.float16) for _ in range(2))
    return Parts(number, 1, 0, blocks, Heads(*arrays))


def crosses(here, there, sent):
    """Whether it arrives as it was."""
    assert here.links.post(there.name, sent)
    return same(there.get(), sent)


def until(holds, timeout=10):
    end = time.monotonic() + timeout
    while not holds():
        assert time.monotonic() < end, "it did not come to hold"
        time.sleep(0.005)
