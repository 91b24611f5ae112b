"""A request on its way over the lanes, and what the front hears of it.

Journey   a request: its Tracks, one a choice, each with what it has drawn so far
Leg       one attempt to serve tracks together, on one lane or on two
events    Started, Drawn, Scored, then one Ended a track
"""

from dataclasses import dataclass, field
from typing import NamedTuple

from engine.core import messages
from engine.core.events import Emission
from engine.core.request import Request
from engine.errors import SeracError


@dataclass(eq=False, slots=True)
class Track:
    """One choice of a request: what it has drawn. `serial` is that of its present attempt, 0 when it is over."""

    journey: "Journey"
    choice: int
    tokens: list[int] = field(default_factory=list)
    serial: int = 0
    scored: int = 0  # prompt tokens whose log-probability was reported, the first, which has none, left out
    losses: int = 0
    over: bool = False


@dataclass(eq=False, slots=True)
class Journey:
    """A request from its admission to its last terminal."""

    request: Request
    seed: int
    tracks: list[Track] = field(default_factory=list)
    held: bool = False
    number: int = 0  # nonzero with a deadline


@dataclass(eq=False, slots=True)
class Leg:
    """One attempt to serve `tracks` together on `target`, their prompt computed on `source` if that is another."""

    tracks: list[Track]
    target: str
    source: str = ""
    handoff: int = 0  # nonzero until its KV has arrived
    chain: list[bytes] = field(default_factory=list)  # of the prompt whose KV is on its way

    @property
    def serials(self) -> tuple[int, ...]:
        return tuple(track.serial for track in self.tracks if not track.over)


class Started(NamedTuple):
    """A choice takes part in steps. cached: prompt tokens found by prefix."""

    track: Track
    cached: int


class Drawn(NamedTuple):
    """Tokens that came next: entries (k, track) of an emission."""

    emission: Emission
    entries: list[tuple[int, Track]]


class Scored(NamedTuple):
    """Log-probabilities of prompt tokens, each position once and in order."""

    track: Track
    scores: messages.Scored


class Ended(NamedTuple):
    """The one terminal of a choice."""

    track: Track
    reason: str
    stop: int | None = None
    error: SeracError | None = None


Event = Started | Drawn | Scored | Ended
