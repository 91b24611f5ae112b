"""One connection to a peer that has proved itself: frames in, messages out, and back.

    control   messages, many frames a call
    bulk      `Parts` alone, one after the other; within a host their KV lies in shared memory (shared.py), and
              where a library was asked for, that moves it (pull.py)

Two connections to a peer, because what stands in the buffers of one, ours and the kernel's, must all leave before
what comes after it: a heartbeat behind 64 MiB of KV would wait for its receiver to read that.
A frame that began must be whole soon, however slowly its bytes come. Both sides say at least a beat every BEAT_S;
when nothing comes for SILENT beats the connection ends, since a network may swallow what we send and not tell. What
is not a whole, right frame ends it with Malformed, as where the next one begins is not to be trusted then. Damaged
KV does not: its length is known, and it is delivered as a part without blocks.
"""

import asyncio
import os
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Sequence
from typing import NamedTuple

from engine.clock import Clock
from engine.core.handoff import Parts
from engine.errors import Malformed
from engine.movers import parts
from engine.movers.frames import MAX_PAYLOAD, PREFIX, SPOKEN, Prefix, check_header, frame, read_prefix
from engine.movers.geometry import Geometry
from engine.movers.pipe import Pipe
from engine.movers.pull import KINDS as PULLED
from engine.movers.pull import WANT, Mover, Pull
from engine.movers.shared import KINDS, LEND, Shared
from engine.movers.versions import spoken
from engine.movers.words import from_bytes
from engine.observe.plan_bytes import MAX_BYTES

BATCH = 1 << 18  # bytes of control frames sent at once
BEAT = 4  # the kind of a frame that only says that somebody is there
BEAT_S = 1.0
SILENT = 4  # turns of ours, not seconds: those while this process was stopped are nobody's silence


class Patience(NamedTuple):
    """How long a frame may take from its first byte."""

    frame_s: float = 5.0
    least_rate: float = float(1 << 20)  # bytes a second, beyond

    def allowed_s(self, prefix: Prefix) -> float:
        """For all of one frame."""
        return self.frame_s + (prefix.header + prefix.payload) / self.least_rate


class Connection:
    """To `peer`, for `way` control or bulk. `geometry` is ours, where KV may come.

    shared_bytes   most memory that we share to send KV; `counts` tells how parts went
    """

    def __init__(
        self,
        pipe: Pipe,
        peer: str,
        way: str,
        geometry: Geometry | None,
        clock: Clock,
        patience: Patience,
        shared_bytes: int,
        counts: Counter[str],
        mover: Mover | None = None,
        version: int = SPOKEN.newest,
    ):
        self.pipe, self.peer, self.way = pipe, peer, way
        self.tasks: list[asyncio.Task] = []
        self._sending = asyncio.Lock()
        self._said = 0  # times
        self._version, self._counts = version, counts
        self._geometry, self._clock, self._patience = geometry, clock, patience
        self.shared = Shared(shared_bytes, geometry, counts) if way == "bulk" and pipe.local else None
        self.pull = Pull(mover, geometry, counts) if way == "bulk" and mover is not None else None

    async def receive(self) -> object:
        """The next message. Raises Malformed, EOFError, OSError, or TimeoutError where a frame takes too long."""
        while (message := await self._frame()) is None:
            pass
        return message

    async def _frame(self) -> object | None:
        await self.pipe.some()
        bulk = self.way == "bulk"
        loop = asyncio.get_running_loop()
        began = loop.time()
        async with asyncio.timeout(self._patience.frame_s) as limit:
            prefix = read_prefix(await self.pipe.take(PREFIX), MAX_BYTES, MAX_PAYLOAD if bulk else 0, self._version)
            if prefix.kind == BEAT and prefix.header == prefix.payload == 0:
                return None
            ours = (parts.KIND, *PULLED, *(KINDS if self.shared is not None else ()))
            if bulk != (prefix.kind in ours):
                raise Malformed(f"frame: got kind {prefix.kind}, which does not travel on a {self.way} connection")
            limit.reschedule(began + self._patience.allowed_s(prefix))
            header = bytes(await self.pipe.take(prefix.header))
            check_header(prefix, header)
            if not bulk:
                return from_bytes(prefix.kind, header, self._clock.now(), self._version)
            if prefix.kind == parts.KIND:
                intake = await self._payload(parts.read_header(header, prefix.payload), prefix.payload)
            elif (intake := await self._beside(prefix, header)) is None:
                return None
        return await self._judge(intake)

    async def _beside(self, prefix: Prefix, header: bytes) -> parts.Intake | None:
        if prefix.payload:
            raise Malformed("shared: got a payload; expected none")
        if prefix.kind not in PULLED:
            return self._shared(prefix, header)
        if self.pull is not None:
            return await self.pull.heard(prefix.kind, header)
        if prefix.kind != WANT:
            raise Malformed("pull: got what was not asked for")
        return None  # the other side has a library, and this one does not

    def _shared(self, prefix: Prefix, header: bytes) -> parts.Intake | None:
        assert self.shared is not None
        descriptor = self.pipe.handed() if prefix.kind == LEND else None
        try:
            return self.shared.heard(prefix.kind, header, descriptor)
        finally:
            if descriptor is not None:
                os.close(descriptor)

    async def _payload(self, header: parts.PartsHeader, payload: int) -> parts.Intake:
        if self._geometry is None:
            raise Malformed("parts: got KV where no lane is")
        intake = parts.Intake(header, payload, self._geometry)
        if intake.fits:
            for view in intake.views():
                await self.pipe.fill(view)
        else:
            await self.pipe.skip(payload)
        return intake

    async def _judge(self, intake: parts.Intake) -> Parts:
        if not intake.fits:
            return intake.header.without()
        for damaged in intake.damaged_heads():
            if damaged:
                return intake.header.without()
            await asyncio.sleep(0)
        return intake.part()

    async def send(self, items: Sequence[bytes | memoryview | Parts]) -> None:
        """Send frames that are bytes, or parts; in the version of this connection. EOFError where it is worn."""
        if self.way == "bulk" and self.pipe.worn:
            raise EOFError("the next connection has a new key")
        pieces: deque[bytes | memoryview] = deque()
        for item in items:
            for piece in await self._pieces(item) if isinstance(item, Parts) else [item]:
                pieces.append(self._spoken(piece) if isinstance(piece, bytes) else piece)
        async with self._sending:
            self._said += 1
            await self.pipe.send(pieces)

    def _spoken(self, said: bytes) -> bytes:
        try:
            return spoken(said, self._version)
        except Malformed:
            self._counts["unspoken"] += 1
            return b""

    async def _pieces(self, part: Parts) -> list[bytes | memoryview]:
        sums = []
        for each in parts.sums_by_head(part):
            sums.append(each)
            await asyncio.sleep(0)
        header = parts.header_of(part, sums)
        if self.pull is not None and (frames := await self.pull.place(part, header)):
            return [*frames]
        if self.shared is not None:
            await self._lend(self.shared)
            if (placed := await self.shared.place(part, header)) is not None:
                return [placed]
        return [frame(parts.KIND, header, parts.num_bytes(part)), *parts.views(part)]

    async def _lend(self, shared: Shared) -> None:
        if (lent := await shared.lend()) is None:
            return
        async with self._sending:
            self._said += 1
            if not await self.pipe.hand(self._spoken(lent[0]), lent[1]):
                shared.stop_lending()

    async def answer(self) -> None:
        """Say what is to be said about shared memory, for as long as the connection lives."""
        assert self.shared is not None
        while True:
            await self.send(await self.shared.said())

    async def answer_pulls(self) -> None:
        """As much about what the library moves."""
        assert self.pull is not None
        while True:
            await self.send(await self.pull.said())

    @property
    def works(self) -> tuple[Callable[["Connection"], Coroutine], ...]:
        """What must run beside `receive` for as long as the connection lives."""
        ways = (self.shared, Connection.answer), (self.pull, Connection.answer_pulls)
        return (Connection.keep, *(work for way, work in ways if way is not None))

    async def keep(self) -> None:
        """Say a beat where nothing else is said; raises TimeoutError when the other side is silent."""
        silent = 0
        while silent < SILENT:
            received, said = self.pipe.received, self._said
            await asyncio.sleep(BEAT_S)
            silent = silent + 1 if self.pipe.received == received else 0
            if self._said == said and not self._sending.locked():
                await self.send([frame(BEAT, b"")])
        raise TimeoutError("the other side is silent")

    def end(self) -> None:
        """Close it, where its loop no longer runs."""
        self.pipe.close()
        if self.shared is not None:
            self.shared.close()
        if self.pull is not None:
            self.pull.close()

    def close(self) -> None:
        """At once; whoever reads from it is told."""
        self.end()
        for task in self.tasks:
            if task is not asyncio.current_task():
                task.cancel()
