"""Every connection of one process to the others of its cluster, on a thread and an asyncio loop of their own.

    post (any thread) --> Outgoing, one a peer and way --writer--> connection ~~~~> reader --> on_message (the loop)
                            full: dropped, counted       |  none: dialed, backs off         end --> on_lost

A message may be lost here, never changed: the session and the handoff ask again (engine/core/). Connections carry
both directions; either side may have made them. A peer is lost when its last control connection ends. Acks and
heartbeats do not wait for a lane's step, as they are this thread's.
Whoever connects proves that he knows the cluster's secret (engine/movers/greeting.py) within GREETING_S, or is
closed and counted, and nobody else notices.
`on_message` and `on_lost` are called on the loop's thread and must return soon.
"""

import asyncio
import contextlib
import socket
import ssl
import threading
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Sequence
from typing import NamedTuple

from engine.clock import Clock, SystemClock
from engine.core.handoff import Parts
from engine.errors import ConfigError, Malformed
from engine.movers import addresses, parts, words
from engine.movers.addresses import Address
from engine.movers.cards import WAYS, Card
from engine.movers.connection import BATCH, Connection, Patience
from engine.movers.frames import SPOKEN, Versions, frame
from engine.movers.geometry import Geometry
from engine.movers.greeting import Stranger, greet
from engine.movers.outgoing import Outgoing
from engine.movers.pull import Mover
from engine.movers.sockets import address_of, dial, end, listening, opened
from engine.movers.tls import Tls, stranger

GREETING_S = 5.0
STRANGERS = 64  # connections that have not proved anything yet
REMEMBERED = 16  # sentences of refusals
BROKEN = (OSError, EOFError, TimeoutError, ssl.SSLError)


class Limits(NamedTuple):
    """Of one peer's queues, and of time."""

    control_bytes: int = 32 << 20
    bulk_bytes: int = 256 << 20
    shared_bytes: int = 256 << 20  # of memory for KV to a process of this host; 0: through sockets
    retry_s: float = 0.05  # first wait after a failed dial; doubles
    retry_most_s: float = 2.0
    patience: Patience = Patience()


class Channel:
    """One way to one peer. All but `outgoing` belongs to the loop."""

    def __init__(self, peer: str, way: str, limits: Limits):
        self.peer, self.way = peer, way
        self.outgoing: Outgoing[bytes | Parts] = Outgoing(
            limits.bulk_bytes if way == "bulk" else limits.control_bytes
        )
        self.connections: list[Connection] = []
        self.writer: asyncio.Task | None = None
        self.wake, self.met = asyncio.Event(), asyncio.Event()
        self.retry_at = 0.0
        self.wait_s = limits.retry_s


class Links:
    """The links of process `name`, whose lane has `geometry`."""

    def __init__(
        self,
        name: str,
        secret: bytes,
        on_message: Callable[[str, object], None],
        on_lost: Callable[[str], None],
        geometry: Geometry | None = None,
        clock: Clock | None = None,
        tls: Tls | None = None,
        limits: Limits | None = None,
        mover: Mover | None = None,
        speaks: Versions = SPOKEN,
    ):
        self.name, self.geometry = name, geometry
        self.counts: Counter[str] = Counter()  # of the loop's thread
        self.dropped = 0  # of any thread, under the lock
        self.refusals: deque[str] = deque(maxlen=REMEMBERED)
        self.addresses: tuple[str, ...] = ()
        self._secret, self._on_message, self._on_lost = secret, on_message, on_lost
        self._mover, self._speaks = mover, speaks
        self._clock, self._tls, self._limits = clock or SystemClock(), tls, limits or Limits()
        self._lock = threading.RLock()  # tasks that end while the loop is closed take it again
        self._channels: dict[tuple[str, str], Channel] = {}
        self._known: dict[str, Address] = {}
        self._stirred: set[tuple[str, str]] = set()
        self._tasks: set[asyncio.Task] = set()
        self._listeners: list[socket.socket] = []
        self._fresh: set[socket.socket] = set()  # accepted in this very turn
        self._strangers = 0
        self._over = False
        self._loop = asyncio.new_event_loop()
        self._ended = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name=f"links of {name}", daemon=True)

    # -- for every thread ---------------------------------------------------------------------------------------

    def start(self, listen: Sequence[str] = ()) -> None:
        """Listen at these addresses (port 0: a free one), and begin. Raises ConfigError, and is closed then."""
        try:
            if self.geometry is not None:
                self.geometry.numpy_dtype()
            for address in [addresses.parse(each) for each in listen]:
                addresses.check_tls(address, self._tls)
                self._listeners.append(listening(address))
        except ConfigError:
            self.close()
            raise
        self.addresses = tuple(str(address_of(listener)) for listener in self._listeners)
        self._thread.start()

    def meet(self, name: str, address: str) -> None:
        """Peer `name` listens at `address`. Raises ConfigError. A peer that has connected needs no such word."""
        found = addresses.parse(address)
        addresses.check_tls(found, self._tls)
        with self._lock:
            self._known[name] = found

    def post(self, receiver: str, message: object) -> bool:
        """Put a message on its way, and return at once; whether there was room for it."""
        if isinstance(message, Parts):
            item, size, way = message, parts.num_bytes(message), "bulk"
        else:
            version = self._speaks.newest
            item = frame(*words.to_bytes(message, self._clock.now(), version), version=version)  # type: ignore[assignment]
            size, way = len(item), "control"
        with self._lock:
            key = receiver, way
            channel = self._channels.get(key) or self._channels.setdefault(key, Channel(*key, self._limits))
            if self._over or not channel.outgoing.put(item, size):
                self.dropped += 1
                return False
            if key in self._stirred:
                return True
            self._stirred.add(key)
            self._loop.call_soon_threadsafe(self._stir, key)
        return True

    def forget(self, name: str) -> None:
        """Close what leads to `name`, and drop what waits for it; nobody is told."""
        self._soon(self._forget, name)

    def close(self) -> None:
        """End all connections and the thread."""
        if self._thread.is_alive():
            self._soon(self._ended.set)
            self._thread.join()
        else:
            self._over = True
            self._end_listeners()
            self._loop.close()

    def _end_listeners(self) -> None:
        for listener in self._listeners:
            end(listener)

    def waiting_bytes(self, receiver: str) -> int:
        """Held for a peer."""
        with self._lock:
            return sum(channel.outgoing.num_bytes for key, channel in self._channels.items() if key[0] == receiver)

    def _soon(self, action: Callable, *arguments: object) -> None:
        with self._lock:
            if not self._over:
                self._loop.call_soon_threadsafe(action, *arguments)

    # -- the loop -----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve())
            for channel in self._channels.values():
                for connection in channel.connections:
                    connection.end()
            for accepted in self._fresh:
                accepted.close()
            with self._lock:
                self._over = True  # nobody may wake the loop, which the runner closes now
        self._end_listeners()

    async def _serve(self) -> None:
        for listener in self._listeners:
            self._spawn(self._accept(listener))
        await self._ended.wait()

    def _spawn(self, work: Coroutine) -> asyncio.Task:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _stir(self, key: tuple[str, str]) -> None:
        with self._lock:
            self._stirred.discard(key)
            channel = self._channels.get(key)
        if channel is not None:
            channel.wake.set()
            if channel.writer is None or channel.writer.done():
                channel.writer = self._spawn(self._write(channel))

    async def _write(self, channel: Channel) -> None:
        while True:
            await channel.wake.wait()
            channel.wake.clear()
            while channel.outgoing:
                # the newest: a peer that dials again has found its older ones dead
                connection = channel.connections[-1] if channel.connections else await self._dial(channel)
                if connection is None:
                    self._drop(channel)
                    break
                items, size = channel.outgoing.take(BATCH if channel.way == "control" else 1)
                try:
                    await connection.send(items)
                except BROKEN:
                    self._lose(connection)
                finally:
                    channel.outgoing.sent(size)

    async def _dial(self, channel: Channel) -> Connection | None:
        """A connection for `channel`; the control connection comes first, so that who gets KV can answer."""
        if channel.way == "bulk" and not (control := self._channel(channel.peer, "control")).connections:
            await self._dial(control)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(channel.retry_at):
                await channel.met.wait()  # it may come to us while we wait
        with self._lock:
            address = self._known.get(channel.peer)
        if address is not None and not channel.connections:
            mine = Card(self.name, channel.peer, channel.way, "".join(self.addresses[:1]), self.geometry)
            made = await self._greeted(dial(address, self._tls), mine, dialing=True)
            if made is not None:
                self._adopt(made)
        if channel.connections:
            channel.wait_s, channel.retry_at = self._limits.retry_s, 0.0
            return channel.connections[-1]
        channel.retry_at = self._loop.time() + channel.wait_s
        channel.wait_s = min(2 * channel.wait_s, self._limits.retry_most_s)
        return None

    async def _greeted(self, opening: Coroutine, mine: Card, dialing: bool) -> Connection | None:
        pipe = made = None
        try:
            async with asyncio.timeout(GREETING_S):
                pipe = await opening
                card = await greet(pipe, self._secret, mine, dialing, self._speaks)
        except (Stranger, Malformed, ssl.SSLError) as error:  # of TLS too: refused certificates are told by alerts
            self._refused(stranger(error) if isinstance(error, ssl.SSLError) else error, dialing)
        except BROKEN:
            self.counts["unreachable" if dialing else "silent"] += 1
        else:
            way = mine.way if dialing else card.way
            if card.address:
                self._introduced(card)
            about = self.geometry, self._clock, self._limits.patience, self._limits.shared_bytes, self.counts
            made = Connection(pipe, card.name, way, *about, self._mover, card.version)
        finally:
            if made is None and pipe is not None:
                pipe.close()
        return made

    def _refused(self, error: Exception, dialing: bool) -> None:
        if isinstance(error, EOFError):
            self.counts["unreachable" if dialing else "silent"] += 1
            return
        self.counts["refused"] += 1
        self.refusals.append(str(error))

    def _introduced(self, card: Card) -> None:
        """Where a peer says that it listens, unless we were told or may not go there."""
        try:
            found = addresses.parse(card.address)
            addresses.check_tls(found, self._tls)
        except ConfigError as error:
            self.refusals.append(str(error))
        else:
            with self._lock:
                self._known.setdefault(card.name, found)

    # -- connections --------------------------------------------------------------------------------------------

    async def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                accepted, _ = await self._loop.sock_accept(listener)
            except OSError:  # too many files, or gone before it was taken
                self.counts["unaccepted"] += 1
                await asyncio.sleep(0.05)
                continue
            self._fresh.add(accepted)
            self._spawn(self._welcome(accepted))

    async def _welcome(self, accepted: socket.socket) -> None:
        self._fresh.discard(accepted)
        if self._strangers >= STRANGERS:
            self.counts["crowded"] += 1
            accepted.close()
            return
        self._strangers += 1
        mine = Card(self.name, "", WAYS[0], "".join(self.addresses[:1]), self.geometry)
        try:
            made = await self._greeted(opened(accepted, self._tls, dialing=False), mine, dialing=False)
        finally:
            self._strangers -= 1
        if made is not None:
            self._adopt(made)

    def _channel(self, peer: str, way: str) -> Channel:
        with self._lock:
            return self._channels.get((peer, way)) or self._channels.setdefault(
                (peer, way), Channel(peer, way, self._limits)
            )

    def _adopt(self, connection: Connection) -> None:
        channel = self._channel(connection.peer, connection.way)
        channel.connections.append(connection)
        channel.met.set()
        channel.retry_at, channel.wait_s = 0.0, self._limits.retry_s
        connection.tasks = [
            self._spawn(self._until_over(connection, work)) for work in (self._read, *connection.works)
        ]
        self.counts["connected"] += 1

    async def _read(self, connection: Connection) -> None:
        while True:
            message = await connection.receive()
            if isinstance(message, Parts) and message.staged is None:
                self.counts["damaged"] += 1
            self._on_message(connection.peer, message)
            del message  # or the memory of a part would be held until the next comes

    async def _until_over(self, connection: Connection, work: Callable[[Connection], Coroutine]) -> None:
        try:
            await work(connection)
        except Malformed as error:
            self.counts["malformed"] += 1
            self.refusals.append(str(error))
        except BROKEN:
            self.counts["ended"] += 1
        finally:
            self._lose(connection)

    def _lose(self, connection: Connection) -> None:
        """A connection is over; with its last control connection a peer is lost."""
        connection.close()
        channel = self._channels.get((connection.peer, connection.way))
        if channel is None or connection not in channel.connections:
            return
        channel.connections.remove(connection)
        if not channel.connections:
            channel.met.clear()
            self._drop(channel)
            if connection.way == "control" and not self._ended.is_set():
                self._on_lost(connection.peer)

    def _drop(self, channel: Channel) -> None:
        with self._lock:
            self.dropped += channel.outgoing.clear()

    def _forget(self, name: str) -> None:
        with self._lock:
            self._known.pop(name, None)
            gone = [self._channels.pop((name, way), None) for way in WAYS]
        for channel in filter(None, gone):
            for connection in channel.connections:
                connection.close()
            if channel.writer is not None:
                channel.writer.cancel()
