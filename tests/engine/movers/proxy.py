"""A TCP proxy that does to bytes what networks do, drawn from a seed.

    client --> proxy --> target        each chunk, each way: late, flipped, torn to single bytes, swallowed,
           <--       <--               or the last one, of this direction or of both

`faults` may be changed at any time; CALM heals everything but what is closed already.
"""

import asyncio
import contextlib
import random
import threading
from typing import NamedTuple

CHUNK = 1 << 16
TORN = 64  # bytes of a chunk that go one by one


class Faults(NamedTuple):
    """Chances for a chunk of bytes."""

    late: float = 0.0
    late_s: float = 0.02
    flip: float = 0.0  # one bit of it
    torn: float = 0.0  # byte by byte
    drop: float = 0.0  # the connection is reset
    half: float = 0.0  # this direction ends, the other goes on
    mute: float = 0.0  # from now on this direction swallows everything


CALM = Faults()
ALL = Faults(late=0.1, flip=0.02, torn=0.02, drop=0.01, half=0.003, mute=0.003)


class Proxy:
    """To 127.0.0.1:port; `address` is where to connect."""

    def __init__(self, port: int, faults: Faults = CALM, seed: int = 0):
        self.faults, self.rng = faults, random.Random(seed)
        self.happened: dict[str, int] = dict.fromkeys(Faults._fields, 0)
        self.address = ""
        self._port = port
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)
        self._writers: set[asyncio.StreamWriter] = set()

    def __enter__(self) -> "Proxy":
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(self, *_) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)

    async def _run(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(self._come, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        self._ready.set()
        await self._stop.wait()
        server.close()
        for writer in self._writers:
            writer.transport.abort()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _come(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._port)
        except OSError:
            writer.transport.abort()
            return
        both = {writer, far_writer}
        self._writers |= both
        with contextlib.suppress(OSError, asyncio.CancelledError):
            await asyncio.gather(self._pump(reader, far_writer), self._pump(far_reader, writer))
        for each in both:
            each.transport.abort()
        self._writers -= both

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        mute = False
        while data := await reader.read(CHUNK):
            if self._happens("drop"):
                raise ConnectionResetError
            if self._happens("half"):
                break
            mute = mute or self._happens("mute")
            if not mute:
                await self._pass_on(bytearray(data), writer)
        if writer.can_write_eof():
            writer.write_eof()

    async def _pass_on(self, data: bytearray, writer: asyncio.StreamWriter) -> None:
        if self._happens("late"):
            await asyncio.sleep(self.rng.uniform(0.0, self.faults.late_s))
        if self._happens("flip"):
            data[self.rng.randrange(len(data))] ^= 1 << self.rng.randrange(8)
        if self._happens("torn"):
            for byte in data[:TORN]:
                writer.write(bytes([byte]))
                await asyncio.sleep(0)
            del data[:TORN]
        writer.write(data)
        await writer.drain()

    def _happens(self, fault: str) -> bool:
        now = self.rng.random() < getattr(self.faults, fault)
        self.happened[fault] += now
        return now
