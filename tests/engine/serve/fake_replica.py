"""A replica without a model: it speaks characters, one token each, and steps when a test says so or by itself."""

import asyncio
from collections.abc import Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from engine.clock import SystemClock
from engine.core.request import Limits, Request, check_request
from engine.errors import AlreadyExists, SeracError
from engine.replica.loads import LaneLoad
from engine.replica.restarts import nothing_to_restart
from engine.serve.client import AsyncClient
from engine.serve.server import Listen, Server


@dataclass
class Info:
    name: str = "tiny"
    revision: str = "r1"
    context: int = 256
    vocab: int = 128
    eos_ids: tuple[int, ...] = (0,)
    defaults: Mapping[str, float] = field(default_factory=dict)


class Characters:
    """Token id = code point; a chat is its contents joined, a BOS (2) in front of texts."""

    vocab = 128

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        return ([2] if add_special else []) + [ord(letter) % 128 for letter in text]

    def encode_chat(self, messages: list[dict[str, str]], add_generation_prompt: bool = True) -> list[int]:
        text = "".join(f"<{turn['role']}>{turn['content']}" for turn in messages)
        return self.encode(text + (">" if add_generation_prompt else ""), add_special=False)

    def decode(self, ids: list[int], skip_special: bool = True) -> str:
        return "".join(chr(token) for token in ids if token > 2 or not skip_special)


@dataclass
class Usage:
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


@dataclass
class TokenLogprob:
    token_id: int
    logprob: float
    rank: int = 1
    top: list[tuple[int, float]] = field(default_factory=list)


@dataclass
class Finish:
    reason: str
    usage: Usage
    stop: str | int | None = None
    error: SeracError | None = None


@dataclass
class Delta:
    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None
    finish: Finish | None = None


class FakeStream:
    def __init__(self, replica: "FakeReplica", request: Request):
        self.replica, self.request = replica, request
        self.waiting: list[Delta] = []
        self.wake = asyncio.Event()
        self.running = set(range(request.sampling.n))
        self.closed = False
        self.wakes = 0

    def push(self, *deltas: Delta) -> None:
        for delta in deltas:
            self.waiting.append(delta)
            if delta.finish is not None:
                self.running.discard(delta.index)
        if not self.running:
            self.replica.running.pop(self.request.request_id, None)
        self.wake.set()

    def close(self) -> None:
        self.closed = True
        self.replica.running.pop(self.request.request_id, None)

    async def __aiter__(self):
        while self.running or self.waiting:
            await self.wake.wait()
            self.wake.clear()
            deltas, self.waiting = self.waiting, []
            self.wakes += 1
            yield deltas


class FakeReplica:
    """Also the `streams` of a server. `step_s` None: tests push deltas; else a task writes the alphabet."""

    def __init__(self, step_s: float | None = None, info: Info | None = None):
        self.info, self.text = info or Info(), Characters()
        self.ready = True
        self.step_s = step_s
        self.running: dict[str, FakeStream] = {}
        self.opened: list[Request] = []
        self.streams: list[FakeStream] = []
        self.tasks: set[asyncio.Task] = set()
        self.refusal: SeracError | Exception | None = None
        self.drained_with: float | None = None
        self.lanes: list[LaneLoad] = []
        self.restart = nothing_to_restart
        self.paired = ""
        self.limits = Limits(self.info.vocab, self.info.context, 4096, 16, self.info.eos_ids)

    async def open(self, request: Request, paired: str = "") -> FakeStream:
        self.paired = paired
        if self.refusal is not None:
            raise self.refusal
        check_request(request, self.limits)
        if request.request_id in self.running:
            raise AlreadyExists("request_id: already runs", field="request_id")
        stream = self.running[request.request_id] = FakeStream(self, request)
        self.opened.append(request)
        self.streams.append(stream)
        if self.step_s is not None:
            task = asyncio.get_running_loop().create_task(self._speak(stream))
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)
        return stream

    async def _speak(self, stream: FakeStream) -> None:
        request = stream.request
        limit = request.stopping.max_tokens or self.info.context - len(request.prompt_ids)
        for k in range(limit):
            await asyncio.sleep(self.step_s)
            if stream.closed:
                return
            token = 97 + k % 26
            for index in sorted(stream.running):
                stream.push(
                    Delta(index, chr(token), [token], finish=done(request, k + 1) if k + 1 == limit else None)
                )

    def abort(self, request_id: str) -> bool:
        stream = self.running.get(request_id)
        if stream is None:
            return False
        for index in sorted(stream.running):
            stream.push(Delta(index, finish=done(stream.request, 0, "abort")))
        return True

    def load(self) -> dict:
        return {"running": len(self.running), "blocks_free": 255, "revision": self.info.revision}

    def lane_loads(self) -> list[LaneLoad]:
        return self.lanes

    def drain(self, timeout_s: float) -> None:
        self.drained_with = timeout_s


def done(request: Request, tokens: int, reason: str = "length", **rest) -> Finish:
    return Finish(reason, Usage(len(request.prompt_ids), tokens), **rest)


@asynccontextmanager
async def serving(replica: FakeReplica, **listen):
    """A server of `replica` on free loopback ports, and a client of both listeners."""
    server = Server(replica, replica, Listen(port=0, admin_port=0, **listen), SystemClock(), version="1")
    addresses = await server.start()
    try:
        async with AsyncClient(addresses[0], admin=addresses[1]) as client:
            client.addresses, client.server = addresses, server
            yield client
    finally:
        await server.stop()


async def until(condition, timeout_s: float = 5.0) -> None:
    """Wait for something that another task brings about."""
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.001)
