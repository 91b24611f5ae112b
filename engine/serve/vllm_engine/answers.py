"""Deltas of a stream -> messages of the contract: token ids, no text, which the gateway makes.

    stream       [chunk of choice 0] [chunk of choice 1] ... complete of each choice when it ends
    otherwise    complete of each choice with all of it, when the last has ended

Cost: a message a choice and wake; the contract has no message for several choices.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from engine.core.request import Request
from engine.serve.contract import Delta, Finish, TokenLogprob
from engine.serve.vllm_engine.stubs import vllm_engine_pb2 as pb


@dataclass(slots=True)
class Choice:
    """All of one choice so far."""

    ids: list[int] = field(default_factory=list)
    scores: list[TokenLogprob] = field(default_factory=list)
    finish: Finish | None = None


class Answers:
    """The messages of one request."""

    def __init__(self, request: Request, stream: bool):
        self._request, self._stream = request, stream
        self._choices = [Choice() for _ in range(request.sampling.n)]
        self._prompt_scores: pb.InputLogProbs | None = None

    def take(self, deltas: Sequence[Delta]) -> Iterator[pb.GenerateResponse]:
        """What to send now that these have come."""
        for delta in deltas:
            choice = self._choices[delta.index]
            choice.ids += delta.token_ids
            choice.scores += delta.logprobs or ()
            choice.finish = delta.finish or choice.finish
            if delta.prompt_logprobs is not None:
                self._prompt_scores = self._input_scores(delta.prompt_logprobs)
            if self._stream:
                yield self._chunk(delta, choice)
                if delta.finish is not None:
                    yield self._complete(delta.index, choice)
        if not self._stream and all(choice.finish is not None for choice in self._choices):
            for index, choice in enumerate(self._choices):
                yield self._complete(index, choice)

    def _chunk(self, delta: Delta, choice: Choice) -> pb.GenerateResponse:
        chunk = pb.GenerateStreamChunk(
            token_ids=delta.token_ids,
            prompt_tokens=len(self._request.prompt_ids),
            completion_tokens=len(choice.ids),
            index=delta.index,
        )
        if delta.finish is not None:
            chunk.cached_tokens = delta.finish.usage.cached_tokens
        if delta.logprobs:
            chunk.output_logprobs.CopyFrom(write_scores(delta.logprobs))
        if delta.prompt_logprobs is not None:
            chunk.input_logprobs.CopyFrom(self._prompt_scores)
        return pb.GenerateResponse(chunk=chunk)

    def _complete(self, index: int, choice: Choice) -> pb.GenerateResponse:
        finish = choice.finish
        assert finish is not None
        complete = pb.GenerateComplete(
            output_ids=choice.ids,
            finish_reason=finish.reason,
            prompt_tokens=finish.usage.prompt_tokens,
            completion_tokens=finish.usage.completion_tokens,
            cached_tokens=finish.usage.cached_tokens,
            index=index,
        )
        if isinstance(finish.stop, str):
            complete.matched_stop_str = finish.stop
        elif finish.stop is not None:
            complete.matched_token_id = finish.stop
        if choice.scores:
            complete.output_logprobs.CopyFrom(write_scores(choice.scores))
        if self._prompt_scores is not None:
            complete.input_logprobs.CopyFrom(self._prompt_scores)
        return pb.GenerateResponse(complete=complete)

    def _input_scores(self, scores: Sequence[TokenLogprob | None]) -> pb.InputLogProbs:
        """One entry a prompt token; nothing predicts the first."""
        written = pb.InputLogProbs(token_ids=self._request.prompt_ids)
        unknown = len(self._request.prompt_ids) - len(scores)
        for scored in [*[None] * unknown, *scores]:
            written.token_logprobs.add(value=None if scored is None else scored.logprob)
            written.top_logprobs.append(top(scored))
        return written


def write_scores(scores: Sequence[TokenLogprob]) -> pb.OutputLogProbs:
    """One entry a token."""
    return pb.OutputLogProbs(
        token_logprobs=[scored.logprob for scored in scores],
        token_ids=[scored.token_id for scored in scores],
        top_logprobs=map(top, scores),
    )


def top(scored: TokenLogprob | None) -> pb.TopLogProbs:
    """The best tokens at one position."""
    best = () if scored is None else scored.top
    return pb.TopLogProbs(values=[value for _, value in best], token_ids=[token for token, _ in best])
