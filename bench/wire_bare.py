"""The floor of a move from process to process: the bytes, a word that they are there, and nothing else.

    tcp, unix   socket --> a buffer of the receiver that is warm                        --one byte--> the next
    shared      copied to a slot --16 bytes: where--> mapped there, a byte a page read  --one byte--> slot is free

TOGETHER parts are on their way at a time.
"""

import asyncio
import contextlib
import mmap
import os
import socket
from collections import deque

import numpy as np

from engine.movers import addresses
from engine.movers.arena import ALIGNED, Arena, Borrowed
from engine.movers.pipe import Pipe, PlainWire
from engine.movers.shared import PLACE
from engine.movers.sockets import dial

TOGETHER = 4  # parts on their way


# -- the receiver --------------------------------------------------------------------------------------------------


async def swallow(listeners: list[socket.socket], size: int) -> None:
    """Read what comes to each of them."""
    await asyncio.gather(*(_accept(each, size) for each in listeners))


async def _accept(listener: socket.socket, size: int) -> None:
    pipe = Pipe(PlainWire((await asyncio.get_running_loop().sock_accept(listener))[0]))
    into = memoryview(bytearray(size))
    with contextlib.suppress(EOFError):
        while True:
            await pipe.fill(into)
            await pipe.send([b"x"])


def lent(listener: socket.socket) -> None:
    """Read a byte of every page of what lies in the memory that comes to this one."""
    listener.setblocking(True)
    with listener.accept()[0] as come:
        _, (descriptor,), _, _ = socket.recv_fds(come, 1, 1)
        borrowed = Borrowed(descriptor, os.fstat(descriptor).st_size, lambda: None)
        os.close(descriptor)
        while where := come.recv(PLACE.size, socket.MSG_WAITALL):
            bytes_there = borrowed.cut(*PLACE.unpack(where))
            bytes_there[:: mmap.PAGESIZE].max()
            del bytes_there
            come.sendall(bytes(len(borrowed.freed())))


# -- the sender ----------------------------------------------------------------------------------------------------


class Bare:
    """Bytes over a socket to an address, on a loop of its own."""

    def __init__(self, address: str, size: int):
        self._loop = asyncio.new_event_loop()
        self._pipe = self._loop.run_until_complete(dial(addresses.parse(address), None))
        self._source = np.ones(size, np.uint8)

    def run(self, count: int) -> None:
        """Move them `count` times."""
        self._loop.run_until_complete(self._run(count))

    async def _run(self, count: int) -> None:
        for number in range(count):
            if number >= TOGETHER:
                await self._answer(1)
            await self._send()
        await self._answer(min(count, TOGETHER))

    async def _send(self) -> None:
        await self._pipe.send([memoryview(self._source)])

    async def _answer(self, count: int) -> None:
        await self._pipe.take(count)

    def close(self) -> None:
        """End it."""
        self._pipe.close()
        self._loop.close()


class BareShared:
    """Bytes through shared memory, on the caller's thread."""

    def __init__(self, address: str, size: int):
        self._source = np.ones(size, np.uint8)
        self._arena = Arena(TOGETHER * (size + ALIGNED))
        self._used: deque[int] = deque()
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(addresses.parse(address).path)
        socket.send_fds(self._socket, [b"x"], [self._arena.descriptor])

    def run(self, count: int) -> None:
        """Move them `count` times."""
        size = len(self._source)
        for _ in range(count):
            self._answers(wait=len(self._used) == TOGETHER)
            offset = self._arena.take(size)
            assert offset is not None
            np.copyto(self._arena.room(offset, offset + size), self._source)
            self._used.append(offset)
            self._socket.sendall(PLACE.pack(offset, size))
        while self._used:
            self._answers(wait=True)

    def _answers(self, wait: bool) -> None:
        with contextlib.suppress(BlockingIOError):
            for _ in self._socket.recv(TOGETHER, 0 if wait else socket.MSG_DONTWAIT):
                self._arena.give(self._used.popleft())

    def close(self) -> None:
        """End it."""
        self._socket.close()
        self._arena.close()
