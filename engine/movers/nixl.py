"""NIXL as a mover of KV bytes: one agent of a process, on a thread of its own. Only this file knows the library.

    loop                                  thread of the agent
      meet, read --job--> queue -->  post | asks how far they are, all of them, turn by turn | answer --> loop
      watch      -------->           turns while others read from here, which some transports need
                                     nothing open: it sleeps

No call of the library is made on a loop: one that copies within a host copies in that very call. Its own thread for
progress stays off, as that never sleeps. A read that its caller gave up goes on here, and holds the memory that it
writes until the library says that it is over: neither releasing its handle nor forgetting the peer stops bytes that
are on their way, it only hides them.
It is configured to reach no further than `devices`, the loopback: what it listens at asks nobody for a secret.
It logs to stdout, which may be a protocol: it is told to log nothing, unless the environment says otherwise.
"""

import asyncio
import contextlib
import importlib.metadata
import logging
import os
import queue
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from types import ModuleType

import numpy as np

from engine.errors import ConfigError, wrong
from engine.movers.staging import Landing, Region, Staging

INSTALL = "pip install --no-deps nixl nixl-cu12"
QUIET = {"UCX_LOG_LEVEL": "fatal", "UCX_LOG_FILE": "stderr", "NIXL_LOG_LEVEL": "FATAL"}
BACKEND = "UCX"
OVER = ("DONE", "nixlRemoteDisconnectError", "nixlCancelledError")  # states in which nothing is written any more
NAME = 32  # characters that nobody else draws
START_S = 30.0
ASK_S, END_S = 1.0, 5.0
READING_S, WATCHING_S, LATE_S = 5e-5, 2e-4, 0.02  # between turns: for a read, for those of others, for what is late


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """While it is loaded, which its first agent completes, the environment says that it logs nothing."""
    added = QUIET.keys() - os.environ.keys()
    os.environ.update({name: QUIET[name] for name in added})
    raises = logging.raiseExceptions
    try:
        yield
    finally:
        logging.raiseExceptions = raises
        for name in added:
            del os.environ[name]


def library() -> ModuleType:
    """Raises ConfigError where it is not installed."""
    try:
        import nixl
    except ImportError:
        raise ConfigError(wrong("--kv-mover", "nixl", f"its library here: {INSTALL}"), field="kv_mover") from None
    return nixl


def failures(found: ModuleType) -> tuple[type[Exception], ...]:
    """What it raises, which has no common class."""
    classes = [each for each in vars(found._bindings).values() if isinstance(each, type)]
    return tuple(each for each in classes if issubclass(each, Exception))


class Read:
    """One transfer, and the memory that it writes."""

    def __init__(self, peer: bytes, into: np.ndarray, answer: "Future[None]", limit_s: float):
        self.peer, self.into, self._answer = peer, into, answer
        self._late_at = time.monotonic() + limit_s
        self.handle: object = None

    @property
    def late(self) -> bool:
        """Nobody waits for it any more."""
        return time.monotonic() > self._late_at

    def tell(self, error: Exception | None) -> None:
        """Whoever waits."""
        if error is None:
            self._answer.set_result(None)
        else:
            self._answer.set_exception(error)


class Agent:
    """The library's agent. Everything on one thread."""

    def __init__(self, found: ModuleType, devices: str):
        config = found.nixl_agent_config(enable_prog_thread=False, backends=[])
        self._name = secrets.token_hex(NAME // 2)
        self._agent = found.nixl_agent(self._name, config)
        self._agent.create_backend(BACKEND, {"engine_config": f"NET_DEVICES={devices}"} if devices else {})
        self._failures = failures(found)
        self._met: dict[bytes, tuple[bytes, int]] = {}  # what each was met with, how often
        self._reads: list[Read] = []
        self._odd: list[Read] = []  # that ended so that nobody knows whether they still write
        self.watched = 0

    def register(self, region: Region) -> bytes:
        """What another agent needs to read these bytes, and no others."""
        address, num_bytes, memory, device = region
        found = self._agent.register_memory([(address, num_bytes, device, "")], memory)
        return self._name.encode() + self._agent.get_partial_agent_metadata(found, True, [BACKEND])

    def meet(self, metadata: bytes) -> bytes:
        """The name of an agent, with which its metadata begins here. Raises OSError."""
        name, about = metadata[:NAME], metadata[NAME:]
        known, times = self._met.get(name, (about, 0))
        if known != about or name not in about:
            raise OSError("nixl: got an agent under the name of another")
        if name not in self._met and (found := self._add(name, about)) != name:
            self._remove(found)
            raise OSError("nixl: got another agent than it was said to be")
        self._met[name] = about, times + 1
        return name

    def _add(self, name: bytes, about: bytes) -> bytes:
        try:
            return self._agent.add_remote_agent(about)
        except self._failures as error:
            self._remove(name)  # or what it understood might stay
            raise OSError(f"nixl: {type(error).__name__}") from None

    def forget(self, name: bytes) -> None:
        """Once for each time it was met. While it is read from it stays known, or nobody could tell until when."""
        about, times = self._met[name]
        self._met[name] = about, times - 1
        self._tidy(name)

    def _tidy(self, name: bytes) -> None:
        if not self._met[name][1] and not any(read.peer == name for read in self._reads):
            del self._met[name]
            self._remove(name)

    def _remove(self, name: bytes) -> None:
        with contextlib.suppress(*self._failures, UnicodeDecodeError):  # it is gone
            self._agent.remove_remote_agent(name)

    def begin(self, source: Region, read: Read) -> None:
        """Post it."""
        local = self._agent.get_xfer_descs([(read.into.ctypes.data, len(read.into), 0)], "DRAM")
        remote = self._agent.get_xfer_descs([(source.address, source.num_bytes, source.device)], source.memory)
        try:
            read.handle = self._agent.initialize_xfer("READ", local, remote, read.peer)
        except self._failures as error:
            read.tell(OSError(f"nixl: {type(error).__name__}"))
        else:
            self._reads.append(read)
            self._judge(read, self._agent.transfer)

    def turn(self) -> float | None:
        """Ask how far all is; the seconds until that is due again."""
        for read in list(self._reads):
            self._judge(read, self._agent.check_xfer_state)
        if self.watched:
            with contextlib.suppress(*self._failures):
                self._agent.get_new_notifs()
        if any(not read.late for read in self._reads):
            return READING_S
        return WATCHING_S if self.watched else LATE_S if self._reads else None

    def _judge(self, read: Read, state_of: Callable[[object], str]) -> None:
        try:
            state = state_of(read.handle)
        except self._failures as error:
            state = type(error).__name__
        if state == "PROC":
            return
        self._reads.remove(read)
        if state not in OVER:
            self._odd.append(read)
        with contextlib.suppress(*self._failures):
            self._agent.release_xfer_handle(read.handle)
        self._tidy(read.peer)
        read.tell(None if state == "DONE" else OSError(f"nixl: {state}"))

    def end(self) -> None:
        """Tell who waits."""
        for read in self._reads:
            read.tell(OSError("nixl: ended"))


class Nixl:
    """An agent and its memory: `num_bytes` to be read by others, and as many to read into.

    devices   of a network, as UCX names them; the loopback reaches this host alone; empty: as UCX_NET_DEVICES says
    Raises ConfigError where there is no library, or none that works.
    """

    def __init__(self, num_bytes: int = 256 << 20, devices: str = "lo"):
        self.staging, self.landing = Staging(num_bytes), Landing(num_bytes)
        self._jobs: queue.SimpleQueue[Callable[[Agent], object] | None] = queue.SimpleQueue()
        self._ended = False
        made: Future[bytes] = Future()
        with quiet():
            found = library()
            self._failures = failures(found)
            self.version = f"nixl {importlib.metadata.version('nixl')}".encode()
            self._thread = threading.Thread(target=self._run, args=(found, devices, made), name="nixl", daemon=True)
            self._thread.start()
            try:
                self.metadata = made.result(START_S)
            except (OSError, TimeoutError) as error:
                raise ConfigError(f"--kv-mover: nixl does not work here: {error}", field="kv_mover") from None

    async def meet(self, metadata: bytes) -> bytes:
        """The name of another agent. Raises OSError."""
        return await self._ask(lambda agent: agent.meet(metadata))

    async def register(self, region: Region) -> bytes:
        """What others need to read a region: memory of a device as well, for as long as it stays there."""
        return await self._ask(lambda agent: agent.register(region))

    def forget(self, peer: bytes) -> None:
        """Read from it no more."""
        self._do(lambda agent: agent.forget(peer))

    async def read(self, peer: bytes, source: Region, into: np.ndarray, limit_s: float) -> None:
        """Fill `into`, which lies in `landing`. Raises OSError; TimeoutError past the limit, when it is held on."""
        answer = _promise()
        read = Read(peer, into, answer, limit_s)
        self._do(lambda agent, read=read: agent.begin(source, read), answer)
        del read, into
        async with asyncio.timeout(limit_s):
            await asyncio.wrap_future(answer)

    def watch(self, change: int) -> None:
        """So many more parts of ours may be read by others."""

        def count(agent: Agent) -> None:
            agent.watched += change

        self._do(count)

    def close(self) -> None:
        """End the agent; a library that hangs is left behind, with the memory that it may write."""
        self._ended = True
        self._jobs.put(None)
        self._thread.join(END_S)

    async def _ask(self, what: Callable[[Agent], bytes]) -> bytes:
        answer = _promise()

        def ask(agent: Agent) -> None:
            try:
                answer.set_result(what(agent))
            except OSError as error:
                answer.set_exception(error)
            except self._failures as error:
                answer.set_exception(OSError(f"nixl: {type(error).__name__}"))

        self._do(ask, answer)
        async with asyncio.timeout(ASK_S):
            return await asyncio.wrap_future(answer)

    def _do(self, job: Callable[[Agent], object], answer: "Future | None" = None) -> None:
        if not self._ended:
            self._jobs.put(job)
        elif answer is not None:
            answer.set_exception(OSError("nixl: ended"))

    def _run(self, found: ModuleType, devices: str, made: "Future[bytes]") -> None:
        try:
            agent = Agent(found, devices)
            agent.register(self.landing.region)
            made.set_result(agent.register(self.staging.region))
        except (OSError, RuntimeError, *self._failures) as error:
            made.set_exception(OSError(type(error).__name__))
            return
        pause: float | None = None
        while (job := self._next(pause)) is not None:
            job(agent)
            del job  # or the memory of a read would be held until the next comes
            pause = agent.turn()
        agent.end()

    def _next(self, pause: float | None) -> Callable[[Agent], object] | None:
        try:
            return self._jobs.get(timeout=pause)
        except queue.Empty:
            return _nothing


def _nothing(agent: Agent) -> None:
    """A turn without a job."""


def _promise() -> Future:
    """A future that who waits for it cannot cancel: he may go, what the library does goes on."""
    promise: Future = Future()
    promise.set_running_or_notify_cancel()
    return promise
