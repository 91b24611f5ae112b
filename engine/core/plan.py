"""What crosses from the brain to the device and back: StepPlan in, StepResult out.

A plan is whole: its bytes are all that a follower, a log or a replay needs. Plan N+1 is made while step N runs, so
it names no token that is still being drawn: tokens live in the device's history, one line per row, and a step reads
its inputs there and writes what it draws there. A row's tokens, block table and sampling record reach the device
once, as a Load, when a sequence takes the row; afterwards a row brings at most one new block a step.

    rows     int32 [rows, 6]   ROW, START, COUNT, BLOCK, SCORE, DRAW
    ROW      the line of history, table and parameters
    START    position of the first token computed, COUNT how many
    BLOCK    nonzero: the block that holds position START + COUNT - 1, new in the table
    SCORE    prompt tokens to score: points at tokens before the last, each judging the prompt token that follows it
    DRAW     1: a point at the last token, whose draw goes into the history at START + COUNT
    A row's points are its last SCORE + DRAW tokens, in order.

Source: the plan of DESIGN.md ("One token-accounting rule").
"""

from dataclasses import dataclass

import numpy as np

ROW, START, COUNT, BLOCK, SCORE, DRAW = range(6)
TOP = 20  # most probable tokens a step can report for a point


@dataclass(frozen=True, slots=True)
class Draw:
    """The sampling record of one sequence, as the device keeps it. Domains are those of core/request.py.

    masked_until  length of the sequence below which `stop_ids` cannot be drawn (prompt + min_tokens).
    """

    seed: int
    choice: int
    prompt_length: int
    temperature: float
    top_k: int  # 0 is off
    top_p: float
    min_p: float
    repetition_penalty: float
    frequency_penalty: float
    presence_penalty: float
    logit_bias: tuple[tuple[int, float], ...]
    masked_until: int
    stop_ids: tuple[int, ...]
    logprobs: int  # -1 is none

    @property
    def plain(self) -> bool:
        """Greedy or pure temperature: nothing but the best (noised) logit is wanted."""
        return (
            self.logprobs < 0
            and not self.logit_bias
            and self.masked_until <= self.prompt_length
            and (self.repetition_penalty == 1.0 and self.frequency_penalty == 0.0 and self.presence_penalty == 0.0)
            and (self.temperature == 0.0 or (self.top_k == 0 and self.top_p == 1.0 and self.min_p == 0.0))
        )


@dataclass(frozen=True, slots=True)
class Load:
    """A sequence takes a row: everything the device must know of it."""

    row: int
    tokens: np.ndarray  # int32 [length], every token known on the host
    blocks: np.ndarray  # int32, the block table so far
    draw: Draw


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step of one lane. `one_token`: every row has COUNT 1, so the decode program serves it."""

    step: int
    rows: np.ndarray  # int32 [rows, 6]
    loads: tuple[Load, ...]
    num_tokens: int
    num_points: int
    one_token: bool
    plain: bool  # every drawing row is `Draw.plain` and none is scored


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step drew; one entry a point, in the order of the plan's rows.

    tokens  int32 [points]        the drawn token; for a scored prompt token, that token
    finite  bool [points]         False where the logits held a NaN or infinity
    The rest only from a step that was not `plain`, else None:
    logprob float32 [points]      log-probability of `tokens` under the raw logits
    rank    int32 [points]        1 for the most probable
    top_ids int32 [points, 20]    the most probable tokens, best first
    top_logprobs float32 [points, 20]
    """

    step: int
    tokens: np.ndarray
    finite: np.ndarray
    logprob: np.ndarray | None = None
    rank: np.ndarray | None = None
    top_ids: np.ndarray | None = None
    top_logprobs: np.ndarray | None = None
