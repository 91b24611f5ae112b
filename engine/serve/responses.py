"""Deltas of a stream -> messages. All that waited becomes one message, one Choice for each index in it.

Cost: a message takes the server 60-90 us whatever it holds, so a busy server sends fewer and longer ones.
"""

from collections.abc import Iterable, Sequence

from engine.core.request import Request
from engine.errors import DeadlineExceeded, SeracError
from engine.serve.contract import Delta, Finish, ModelInfo, TokenLogprob
from engine.serve.proto.serac.v1 import inference_pb2 as pb

REASONS = {
    "stop": pb.FINISH_REASON_STOP,
    "length": pb.FINISH_REASON_LENGTH,
    "abort": pb.FINISH_REASON_ABORT,
}


def failure(deltas: Iterable[Delta]) -> SeracError | None:
    """The error that ends the whole call, if a choice in `deltas` ended by one."""
    for delta in deltas:
        if delta.finish is None:
            continue
        if delta.finish.error is not None:
            return delta.finish.error
        if delta.finish.reason == "deadline":
            return DeadlineExceeded("deadline: passed before the request was done")
        if delta.finish.reason not in REASONS:
            return SeracError("request: ended by an error that has no description")
    return None


class Answer:
    """Writes the messages of one request: `add` deltas, `take` what is new since the last take."""

    def __init__(
        self, request: Request, info: ModelInfo, kind: type[pb.GenerateResponse | pb.GenerateUnaryResponse]
    ):
        self._kind = kind
        self._head = {
            "request_id": request.request_id,
            "model": info.name,
            "revision": info.revision,
            "seed": request.sampling.seed,
        }
        self._message = kind(**self._head)
        self._choices: dict[int, pb.Choice] = {}
        self._texts: dict[int, list[str]] = {}
        self._prompt_ids = request.prompt_ids
        self._scored = False

    def add(self, deltas: Iterable[Delta]) -> None:
        """Join `deltas` to what waits."""
        for delta in deltas:
            choice = self._choices.get(delta.index)
            if choice is None:
                choice = self._choices[delta.index] = self._message.choices.add(index=delta.index)
            self._texts.setdefault(delta.index, []).append(delta.text)
            choice.token_ids.extend(delta.token_ids)
            if delta.logprobs:
                choice.logprobs.extend(map(write_logprob, delta.logprobs))
            if delta.finish is not None and delta.finish.reason in REASONS:
                choice.finish.CopyFrom(write_finish(delta.finish))
            if delta.prompt_logprobs is not None and not self._scored:
                self._scored = True
                self._message.prompt_logprobs.extend(self._scores(delta.prompt_logprobs))

    def take(self) -> pb.GenerateResponse | pb.GenerateUnaryResponse | None:
        """The message of all that was added, or None when it would say nothing."""
        for index, choice in self._choices.items():
            choice.text = "".join(self._texts[index])
        message = self._message
        message.choices.sort(key=lambda choice: choice.index)
        says = bool(message.prompt_logprobs) or any(
            choice.text or choice.token_ids or choice.HasField("finish") for choice in self._choices.values()
        )
        self._message, self._choices, self._texts = self._kind(**self._head), {}, {}
        return message if says else None

    def _scores(self, scores: Sequence[TokenLogprob | None]) -> list[pb.TokenLogprob]:
        """One entry a prompt token; nothing predicts the first, which has its id alone."""
        known = [None] * (len(self._prompt_ids) - len(scores)) + list(scores)
        return [
            pb.TokenLogprob(token_id=token) if scored is None else write_logprob(scored)
            for token, scored in zip(self._prompt_ids, known, strict=True)
        ]


def write_finish(finish: Finish) -> pb.Finish:
    """How a choice ended, what matched, what it cost."""
    usage = pb.Usage(
        prompt_tokens=finish.usage.prompt_tokens,
        completion_tokens=finish.usage.completion_tokens,
        cached_tokens=finish.usage.cached_tokens,
    )
    message = pb.Finish(reason=REASONS[finish.reason], usage=usage)
    if isinstance(finish.stop, str):
        message.stop = finish.stop
    elif finish.stop is not None:
        message.token_id = finish.stop
    return message


def write_logprob(scored: TokenLogprob) -> pb.TokenLogprob:
    """One token's entry."""
    return pb.TokenLogprob(
        token_id=scored.token_id,
        logprob=scored.logprob,
        rank=scored.rank or 0,
        top_token_ids=[token for token, _ in scored.top],
        top_logprobs=[logprob for _, logprob in scored.top],
    )
