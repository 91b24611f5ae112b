"""What a lane tells the streams after a turn. Tokens of a step travel as arrays, one entry a sequence."""

from dataclasses import dataclass

import numpy as np

from engine.core.sequence import Sequence
from engine.errors import SeracError


@dataclass(frozen=True, slots=True)
class Started:
    """A sequence took part in steps for the first time."""

    sequence: Sequence


@dataclass(frozen=True, slots=True)
class Emission:
    """Tokens drawn in one step, for the sequences that still run or just ended with them.

    serials int64 [k]; tokens int32 [k]; positions int64 [k] of the tokens in their sequences; the rest, [k] and
    [k, 20], only when the step was not plain.
    """

    serials: np.ndarray
    tokens: np.ndarray
    positions: np.ndarray
    logprob: np.ndarray | None = None
    rank: np.ndarray | None = None
    top_ids: np.ndarray | None = None
    top_logprobs: np.ndarray | None = None


@dataclass(frozen=True, slots=True)
class Scored:
    """Log-probabilities of consecutive prompt tokens of one sequence; `first` is the position of the first."""

    sequence: Sequence
    first: int
    logprob: np.ndarray
    rank: np.ndarray
    top_ids: np.ndarray
    top_logprobs: np.ndarray


@dataclass(frozen=True, slots=True)
class Computed:
    """A sequence that only prefills has KV of its first `positions` positions in its blocks."""

    sequence: Sequence
    positions: int


@dataclass(frozen=True, slots=True)
class Ended:
    """A sequence is over; nothing follows.

    reason  stop, length, abort, deadline or error
    stop    the token that ended it
    """

    sequence: Sequence
    reason: str
    stop: int | None = None
    error: SeracError | None = None


Event = Started | Emission | Scored | Computed | Ended
