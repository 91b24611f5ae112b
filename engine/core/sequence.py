"""One stream of a request: what it knows, where it is, how it ends.

    WAITING --admit--> RUNNING --end--> ENDED
       ^                  |              n > 1: the first sequence leads; the others wait in `followers` until its
       +----preempt-------+              prompt is published, then find the prompt's blocks in the prefix cache.
                          |
                          +--prompt computed--> RESTING     one that only prefills: it holds blocks, but no row

While a sequence runs, the lane's row holds its tokens (engine/core/rows.py); `tokens` is brought up to date when it
leaves the row. Sampling is a function of seed, choice and position, so a sequence goes on anywhere from the tokens
it has drawn (`Part.emitted`).
"""

from collections.abc import Sequence as PySequence
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

import numpy as np

from engine.core.blocks import Content
from engine.core.plan import Draw
from engine.core.request import Request


class State(Enum):
    """Where a sequence is."""

    FOLLOWING = "following"
    WAITING = "waiting"
    RUNNING = "running"
    RESTING = "resting"
    ENDED = "ended"


class Part(NamedTuple):
    """One choice of a request to serve: its serial, and the tokens it has drawn elsewhere."""

    serial: int
    choice: int = 0
    emitted: tuple[int, ...] = ()


@dataclass(eq=False, slots=True)
class Sequence:
    """serial is unique in a lane for ever; limit is the length at which it ends."""

    serial: int
    request: Request
    choice: int
    draw: Draw
    limit: int
    tokens: np.ndarray  # int32, known tokens; a row's history is newer while RUNNING
    parent: bytes  # the key before its first block
    stop_ids: frozenset[int]
    chain: list[Content] = field(default_factory=list)
    state: State = State.WAITING
    row: int = -1
    blocks: list[int] = field(default_factory=list)  # held without a row: moved here before it starts, or RESTING
    computed: int = 0  # positions whose KV is in `blocks`
    rests: bool = False  # it only prefills, all but its last token
    cached: int = 0  # prompt tokens found by prefix when first admitted
    admitted: bool = False  # it took part in steps
    scored: int = 0  # prompt tokens whose log-probability was reported
    host_bound: bool = False  # what it draws next depends on its last token seen by the host
    held: bool = False  # its client does not read
    preemptions: int = 0
    followers: list["Sequence"] = field(default_factory=list)

    @property
    def prompt_length(self) -> int:
        return self.draw.prompt_length

    @property
    def waits(self) -> bool:
        """It has no row, and blocks only if they came from another lane."""
        return self.state is State.WAITING

    @property
    def scores(self) -> bool:
        """Prompt tokens are still to be scored."""
        return self.request.sampling.prompt_logprobs is not None and self.choice == 0 and (
            self.scored < self.prompt_length - 1
        )  # fmt: skip


def sequences(
    request: Request,
    parts: PySequence[Part],
    seed: int,
    context: int,
    eos_ids: tuple[int, ...],
    parent: bytes,
) -> list[Sequence]:
    """The sequences of `parts` of `request`, leader first, its followers listed. `seed` serves one without."""
    sampling, stopping, prompt = request.sampling, request.stopping, len(request.prompt_ids)
    limit = context if stopping.max_tokens is None else prompt + stopping.max_tokens
    stop_ids = frozenset(stopping.stop_token_ids) | (frozenset() if stopping.ignore_eos else frozenset(eos_ids))
    group = []
    for serial, choice, emitted in parts:
        tokens = np.array(request.prompt_ids + emitted, np.int32)
        draw = Draw(
            seed=seed if sampling.seed is None else sampling.seed,
            choice=choice,
            prompt_length=prompt,
            temperature=sampling.temperature,
            top_k=max(sampling.top_k, 0),
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            repetition_penalty=sampling.repetition_penalty,
            frequency_penalty=sampling.frequency_penalty,
            presence_penalty=sampling.presence_penalty,
            logit_bias=sampling.logit_bias,
            masked_until=prompt + stopping.min_tokens,
            stop_ids=tuple(sorted(stop_ids)),
            logprobs=-1 if sampling.logprobs is None else sampling.logprobs,
        )
        group.append(Sequence(serial, request, choice, draw, limit, tokens, parent, stop_ids))
    group[0].followers = group[1:]
    for sequence in group[1:]:
        sequence.state = State.FOLLOWING
    return group
