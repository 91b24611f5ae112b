"""InferenceService: a message in, a request to the replica, its stream back out.

    read (names, prompt) -> open stream -> [wait, one message] ... -> end
    client cancels, disconnects, is late, does not read: the stream is closed at once, which frees its blocks

Cost: a message per wake of a stream; 60-90 us each.
"""

import asyncio
import secrets
import uuid
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager

from google.protobuf.message import Message

from engine.clock import Clock
from engine.core.request import MAX_SEED, Request
from engine.errors import InvalidArgument, ResourceExhausted, wrong
from engine.serve.contract import Delta, Replica, Stream, Streams
from engine.serve.edge import Call
from engine.serve.gate import Gate
from engine.serve.proto.serac.v1 import inference_pb2 as pb
from engine.serve.requests import Generate, check_model, check_names, is_long, prompt_ids, read_request
from engine.serve.responses import Answer, failure

REQUEST_ID_KEY = "serac-request-id"


def draw_seed() -> int:
    """A seed of the whole domain."""
    return secrets.randbelow(MAX_SEED + 1)


def draw_id() -> str:
    """An id no other request has."""
    return uuid.uuid4().hex


class InferenceService:
    """The public RPCs. `stall_s`: a client that reads nothing for this long loses its stream."""

    def __init__(
        self,
        replica: Replica,
        streams: Streams,
        gate: Gate,
        clock: Clock,
        *,
        stall_s: float = 30.0,
        draw_seed: Callable[[], int] = draw_seed,
        draw_id: Callable[[], str] = draw_id,
    ):
        self._replica, self._streams, self._gate, self._clock = replica, streams, gate, clock
        self._stall_s = stall_s
        self._draw_seed, self._draw_id = draw_seed, draw_id

    async def generate(self, message: pb.GenerateRequest, context: Call) -> None:
        """Write a message for everything that waits, until every choice has ended."""
        async with self.running(message, context) as (request, stream):
            await context.send_initial_metadata(((REQUEST_ID_KEY, request.request_id),))
            answer = Answer(request, self._replica.info, pb.GenerateResponse)
            async for deltas in stream:
                answer.add(deltas)
                part = answer.take()
                if part is not None:
                    await self.send(context, part)
                self.check(deltas)

    async def generate_unary(self, message: pb.GenerateUnaryRequest, context: Call) -> pb.GenerateUnaryResponse:
        """All of it in one message."""
        async with self.running(message, context) as (request, stream):
            answer = Answer(request, self._replica.info, pb.GenerateUnaryResponse)
            async for deltas in stream:
                answer.add(deltas)
                self.check(deltas)
            return answer.take() or pb.GenerateUnaryResponse(request_id=request.request_id)

    async def tokenize(self, message: pb.TokenizeRequest, context: Call) -> pb.TokenizeResponse:
        """The ids that a prompt would have."""
        check_model(message.model, self._replica.info)
        return pb.TokenizeResponse(
            token_ids=await self._prompt_ids(message), context_length=self._replica.info.context
        )

    async def detokenize(self, message: pb.DetokenizeRequest, context: Call) -> pb.DetokenizeResponse:
        """The text of ids of the vocabulary."""
        info = self._replica.info
        check_model(message.model, info)
        for k, token in enumerate(message.token_ids):
            if not 0 <= token < info.vocab:
                expected = f"a token id in 0..V-1 = 0..{info.vocab - 1}"
                raise InvalidArgument(wrong(f"token_ids[{k}]", token, expected), field="token_ids")
        skip = message.skip_special_tokens if message.HasField("skip_special_tokens") else True
        text = await asyncio.to_thread(self._replica.text.decode, list(message.token_ids), skip_special=skip)
        return pb.DetokenizeResponse(text=text)

    async def list_models(self, message: pb.ListModelsRequest, context: Call) -> pb.ListModelsResponse:
        """The one model of this replica."""
        info = self._replica.info
        model = pb.Model(
            name=info.name,
            revision=info.revision,
            context_length=info.context,
            vocab_size=info.vocab,
            eos_token_ids=list(info.eos_ids),
            defaults={name: float(value) for name, value in info.defaults.items()},
        )
        return pb.ListModelsResponse(models=[model])

    async def abort(self, message: pb.AbortRequest, context: Call) -> pb.AbortResponse:
        """End a request by its id; asking twice is no error."""
        if not message.request_id:
            raise InvalidArgument(
                "request_id: got an empty string; expected the id of a request", field="request_id"
            )
        return pb.AbortResponse(aborted=self._replica.abort(message.request_id))

    async def send(self, context: Call, part: Message) -> None:
        """Write a message of a stream, unless its client has stopped reading. Raises ResourceExhausted."""
        try:
            async with asyncio.timeout(self._stall_s):
                await context.write(part)
        except TimeoutError:
            raise ResourceExhausted(f"stream: the client read nothing for {self._stall_s:g} s") from None

    @staticmethod
    def check(deltas: Iterable[Delta]) -> None:
        """Raises the error of a choice that has failed."""
        error = failure(deltas)
        if error is not None:
            raise error

    async def read(self, message: Generate, context: Call) -> Request:
        """The request in a message, checked as far as its message is needed for that."""
        check_names(message, self._replica.info)
        left_s = context.time_remaining()
        deadline_at = None if left_s is None else self._clock.now() + left_s
        message.request_id = message.request_id or self._draw_id()
        ids = await self._prompt_ids(message)
        if not message.sampling.HasField("seed"):
            message.sampling.seed = self._draw_seed()
        return read_request(message, ids, self._replica.info.defaults, deadline_at)

    @asynccontextmanager
    async def running(
        self, message: Generate, context: Call, paired: str = ""
    ) -> AsyncIterator[tuple[Request, Stream]]:
        """From admission to the end of the stream; whichever way the call ends, the stream is closed."""
        with self._gate.enter():
            request = await self.read(message, context)
            stream = await self._streams.open(request, paired)
            context.add_done_callback(lambda _: stream.close())
            try:
                yield request, stream
            finally:
                stream.close()

    async def _prompt_ids(self, message: Generate | pb.TokenizeRequest) -> list[int]:
        text, context = self._replica.text, self._replica.info.context
        if is_long(message):
            return await asyncio.to_thread(prompt_ids, message, text, context)
        return prompt_ids(message, text, context)
