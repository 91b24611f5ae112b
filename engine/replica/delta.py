"""What a client gets of a request, in the words of the project; the doors turn it into theirs."""

from dataclasses import dataclass

from engine.errors import SeracError


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token's log-probability under the raw logits; rank 1 is best; `top` holds (token id, it), best first."""

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Usage:
    """What one choice cost, in tokens; cached: prompt tokens found by prefix."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class Finish:
    """Why a choice ended: stop, length, abort, deadline or error. `stop` is the string or token id that matched."""

    reason: str
    usage: Usage
    stop: str | int | None = None
    error: SeracError | None = None


@dataclass(frozen=True, slots=True)
class Delta:
    """What is new of one choice. prompt_logprobs: an entry a prompt token, None for the first; once, choice 0."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None
    finish: Finish | None = None
