"""VllmEngine: the contract by which gateways drive this replica, a thin layer over InferenceService.

    Generate    requests.py -> InferenceService.running -> answers.py     pairing.py: a prompt for another replica
    others      facts.py, tokenizer.py, events.py

What a gateway calls a worker is this server: one replica and one rank, however many lanes it has.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from datetime import UTC, datetime

from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.message import Message

from engine.clock import Clock
from engine.errors import (
    Forbidden,
    InvalidArgument,
    ResourceExhausted,
    SeracError,
    Unavailable,
    Unsupported,
    wrong,
)
from engine.serve.edge import Call
from engine.serve.gate import Gate
from engine.serve.inference import InferenceService
from engine.serve.vllm_engine import facts, pairing, tokenizer
from engine.serve.vllm_engine.answers import Answers
from engine.serve.vllm_engine.contract import Worker
from engine.serve.vllm_engine.events import Events
from engine.serve.vllm_engine.requests import read_generate
from engine.serve.vllm_engine.stubs import common_pb2 as common
from engine.serve.vllm_engine.stubs import vllm_engine_pb2 as pb

MOST_WAITING = 1 << 20  # changes of blocks that a subscriber has not read


def descriptor() -> ServiceDescriptor:
    """What the service is called and offers."""
    return pb.DESCRIPTOR.services_by_name["VllmEngine"]


class VllmEngineService:
    """The RPCs. `wall` is the time of day, in seconds since 1970."""

    def __init__(
        self,
        worker: Worker,
        inference: InferenceService,
        gate: Gate,
        clock: Clock,
        version: str = "",
        wall: Callable[[], float] = time.time,
    ):
        self._worker, self._inference, self._gate, self._clock = worker, inference, gate, clock
        self._version, self._wall = version, wall
        self._started_at, self._loads = clock.now(), facts.Loads()
        self._packed: bytes | None = None  # the tokenizer's files, once somebody asked

    async def generate(self, message: pb.GenerateRequest, context: Call) -> None:
        """Chunks and a complete message for each choice, or only the latter; or a prompt held for another."""
        paired = self._paired(message)
        if pairing.holds(paired):
            await self._hold(message, context)
            return
        async with self._inference.running(read_generate(message), context, paired) as (request, stream):
            answers = Answers(request, message.stream)
            async for deltas in stream:
                self._inference.check(deltas)
                for part in answers.take(deltas):
                    await self._inference.send(context, part)

    def _paired(self, message: pb.GenerateRequest) -> str:
        """What the request says of a partner. Raises Unsupported where there can be none."""
        text = message.kv_transfer_params_json
        if text and self._worker.pairing is None:
            expected = "--workers and SERAC_CLUSTER_SECRET, the same for both replicas"
            raise Unsupported(
                f"{pairing.FIELD}: this server has no partners; expected {expected}", field=pairing.FIELD
            )
        return text

    async def _hold(self, message: pb.GenerateRequest, context: Call) -> None:
        """Have the prompt computed and held; what is answered goes to whoever decodes."""
        with self._gate.enter():
            request = await self._inference.read(read_generate(message), context)
            shown: asyncio.Future[str | SeracError] = asyncio.get_running_loop().create_future()
            number = self._worker.offer(request, lambda answer: shown.done() or shown.set_result(answer))
            try:
                answer = await shown
            finally:
                self._worker.close_offer(number)
            if isinstance(answer, SeracError):
                raise answer
            await self._inference.send(context, pairing.held(request, answer))

    async def abort(self, message: pb.AbortRequest, context: Call) -> pb.AbortResponse:
        """End requests by id; those that do not run are none of anybody's concern."""
        for request_id in message.request_ids:
            self._worker.abort(request_id)
        return pb.AbortResponse()

    async def health_check(self, message: pb.HealthCheckRequest, context: Call) -> pb.HealthCheckResponse:
        """Whether a request would be let in."""
        state = "draining" if self._gate.draining else "ready" if self._gate.ready else "not ready"
        return pb.HealthCheckResponse(healthy=self._gate.ready, message=state)

    async def get_model_info(self, message: pb.GetModelInfoRequest, context: Call) -> pb.GetModelInfoResponse:
        """The model."""
        return facts.model_info(self._worker)

    async def get_server_info(self, message: pb.GetServerInfoRequest, context: Call) -> pb.GetServerInfoResponse:
        """The server."""
        uptime_s = self._clock.now() - self._started_at
        return facts.server_info(self._worker, self._gate.open_calls, uptime_s, self._gate.draining)

    async def get_loads(self, message: pb.GetLoadsRequest, context: Call) -> pb.GetLoadsResponse:
        """The sums over lanes, as the one rank."""
        if message.dp_rank != 0:
            expected = "0, the only rank of this server"
            raise InvalidArgument(wrong("dp_rank", message.dp_rank, expected), field="dp_rank")
        stamp = datetime.fromtimestamp(self._wall(), UTC).isoformat()
        return self._loads.read(self._worker, self._clock.now(), self._version, stamp)

    async def get_tokenizer(self, message: common.GetTokenizerRequest, context: Call) -> None:
        """The tokenizer's files as a zip, its sha256 with the last part."""
        if self._packed is None:
            self._packed = await asyncio.to_thread(tokenizer.pack, self._worker.text.folder)
        for data, digest in tokenizer.chunks(self._packed):
            await self._inference.send(context, common.GetTokenizerChunk(data=data, sha256=digest))

    async def flush_cache(self, message: common.FlushCacheRequest, context: Call) -> common.FlushCacheResponse:
        """Let no prefix of now be found any more, once nothing runs."""
        if not (math.isfinite(message.timeout_s) and message.timeout_s >= 0):
            raise InvalidArgument(wrong("timeout_s", message.timeout_s, "a finite number >= 0"), field="timeout_s")
        try:
            async with asyncio.timeout(message.timeout_s):
                await self._gate.idle.wait()
        except TimeoutError:
            return common.FlushCacheResponse(message=f"{self._gate.open_calls} requests run; nothing was flushed")
        self._worker.forget_blocks()
        return common.FlushCacheResponse(success=True)

    async def subscribe_kv_events(self, message: common.SubscribeKvEventsRequest, context: Call) -> None:
        """All published blocks, then their changes. They hold prompts, so both ends must show certificates."""
        if "x509_pem_cert" not in context.auth_context():
            raise Forbidden(
                "kv events: they hold the tokens of prompts; expected mutual TLS: --tls-cert, --tls-key and "
                "--tls-client-ca here, a client certificate there"
            )
        if self._gate.draining:
            raise Unavailable("server: draining; try another replica")
        wake, events = asyncio.Event(), Events(message.start_sequence_number)
        reader, known = self._worker.read_blocks(wake.set)
        try:
            for batch in events.snapshot(known, self._wall()):
                await self._inference.send(context, batch)
            while await wake.wait():
                wake.clear()
                if reader.waiting > MOST_WAITING:
                    raise ResourceExhausted(f"kv events: more than {MOST_WAITING} wait to be read; subscribe again")
                for batch in events.changes(reader.take(), self._wall()):
                    await self._inference.send(context, batch)
        finally:
            self._worker.close_blocks(reader)

    async def embed(self, message: pb.EmbedRequest, context: Call) -> Message:
        """Not served."""
        raise Unsupported("embed: the model generates text; expected Generate")

    async def start_profile(self, message: common.StartProfileRequest, context: Call) -> Message:
        """Not served."""
        raise Unsupported("profile: there is no profiler; expected --plan-log and serac replay")

    async def stop_profile(self, message: common.StopProfileRequest, context: Call) -> Message:
        """Not served."""
        raise Unsupported("profile: there is no profiler; expected --plan-log and serac replay")
