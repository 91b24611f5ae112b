"""What a front and a lane say to each other. Lanes among themselves speak the words of engine/core/handoff.py.

    front -> lane   Submit, Expect, Prefill, Cancel, Hold, Fence, Meet, Prefixes
    lane -> front   Started, Emission, Scored, Over, Committed, Held, Failed, Load, Blocks

A serial names one choice of one attempt, for ever: what a lane still says of an attempt that was given up bears a
serial that nobody knows any more. A handoff's number is a serial too. Between front and lane messages arrive once
and in order (engine/core/session.py, where they cross a network); between lanes they may not.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from engine.core.blocks import News
from engine.core.events import Emission
from engine.core.request import Request
from engine.core.sequence import Part
from engine.errors import SeracError

FRONT = "front"


class Submit(NamedTuple):
    """Serve these choices of a request. `seed` serves it if it has none."""

    request: Request
    seed: int
    parts: tuple[Part, ...]


class Expect(NamedTuple):
    """Serve these choices once the KV of the first one's tokens has come from lane `source`. ticket: 16 bytes.

    held    the source has everything, and gives it to whoever shows the ticket first
    """

    handoff: int
    source: str
    submit: Submit
    ticket: bytes = b""
    held: bool = False


class Prefill(NamedTuple):
    """Compute the KV of all but the last of the request's prompt tokens, for lane `target` to fetch.

    Without a target it is held, for LEASE_S, for the first lane that shows the ticket.
    """

    handoff: int
    target: str
    request: Request
    ticket: bytes = b""


class Cancel(NamedTuple):
    """End what still runs of these choices and of this handoff (0: none); again is nothing."""

    serials: tuple[int, ...]
    handoff: int
    reason: str


class Hold(NamedTuple):
    """Pause these choices, whose client does not read, or let them go on."""

    serials: tuple[int, ...]
    held: bool


class Fence(NamedTuple):
    """The process behind `lane` is gone or cut off; what it still sends is not to be taken."""

    lane: str


class Meet(NamedTuple):
    """Lane `lane` of `tp` devices can be reached at `addresses`, one a process; it knows as much of you.

    foreign  it is of another cluster, whose front tells it nothing of you
    """

    lane: str
    addresses: tuple[str, ...]
    tp: int = 1
    foreign: bool = False


class Prefixes(NamedTuple):
    """Whether to tell from now on which blocks are published, and whether to unpublish all of them first."""

    tell: bool
    forget: bool


class Started(NamedTuple):
    """A choice, or a handoff's prompt, took part in steps. cached: tokens of it found by prefix."""

    serial: int
    cached: int


@dataclass(frozen=True, slots=True)
class Scored:
    """Log-probabilities of consecutive prompt tokens of one choice; `first` is the position of the first.

    logprob float32 [k]; rank int32 [k]; top_ids int32 [k, 20]; top_logprobs float32 [k, 20].
    """

    serial: int
    first: int
    logprob: np.ndarray
    rank: np.ndarray
    top_ids: np.ndarray
    top_logprobs: np.ndarray

    def after(self, count: int) -> "Scored":
        """Without the first `count` tokens."""
        arrays = (self.logprob, self.rank, self.top_ids, self.top_logprobs)
        return Scored(self.serial, self.first + count, *(array[count:] for array in arrays))


class Over(NamedTuple):
    """A choice has ended; nothing follows. `reason` and `stop` as in events.Ended."""

    serial: int
    reason: str
    stop: int | None
    error: SeracError | None


class Committed(NamedTuple):
    """All KV of a handoff is here; its choices wait for a row like any other."""

    handoff: int


class Held(NamedTuple):
    """The prompt of a handoff without a target is computed, and waits for whoever shows the ticket."""

    handoff: int


class Failed(NamedTuple):
    """A handoff came to nothing. `error` where trying again elsewhere cannot help."""

    handoff: int
    reason: str
    error: SeracError | None = None


class Load(NamedTuple):
    """What a lane has to do and to spare. Counts of this moment but for seven totals and two sizes."""

    running: int
    waiting: int
    flights: int
    queued_tokens: int  # of prompts, not computed yet
    blocks: int
    available: int
    cached: int
    writing: int
    quarantined: int
    handoffs: tuple[tuple[str, int], ...]  # (state, how many), both sides together
    preemptions: int  # from here on totals
    steps: int
    moved_blocks: int
    prompt_tokens: int
    cached_tokens: int
    rows: int = 0  # the lane's sizes: sequences side by side, tokens a step; 0: not said
    step_tokens: int = 0
    late_compiles: int = 0  # programs compiled after the lane was ready; the lane's loop knows
    asked_again: int = 0  # times that blocks were asked for once more, of handoffs that are over


class Blocks(NamedTuple):
    """Blocks that were published and unpublished, in order. whole: what was said before holds no more."""

    whole: bool
    news: tuple[News, ...]


ToLane = Submit | Expect | Prefill | Cancel | Hold | Fence | Meet | Prefixes
ToFront = Started | Emission | Scored | Over | Committed | Held | Failed | Load | Blocks
