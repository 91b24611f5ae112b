"""Prompts that a lane computes and holds for a lane of another replica, as the front of the holder sees them.

    open --Prefill without a target--> lane --Held--> told: Claim      whoever shows its ticket first gets the KV
            lane lost | Failed | deadline --> told: an error           close: nobody waits any more

What is held ends by itself: it is fetched, or the lane lets go after LEASE_S (engine/core/handoff.py). So nothing
is remembered here once a Claim was told. Numbers are of their own, far above those of the router, and begin at
random, so that no two clusters draw the same. Pure; cost: a dict entry a prompt.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import NamedTuple

from engine.core.admission import Lane, admit
from engine.core.messages import Cancel, Failed, Held, Prefill, ToLane
from engine.core.request import Request, Sampling, Stopping
from engine.errors import SeracError, Unavailable

FIRST = 1 << 61  # and FIRST more: handoffs of holds


class Claim(NamedTuple):
    """What shows that a lane holds a prompt for whoever comes with this. ticket: 16 bytes."""

    lane: str
    handoff: int
    ticket: bytes
    addresses: tuple[str, ...] = ()  # of the lane's processes
    tp: int = 1


class Holds:
    """Over the router's `lanes`; `say` brings a message to one. `draw_ticket` returns 16 random bytes."""

    def __init__(
        self,
        lanes: Mapping[str, Lane],
        say: Callable[[str, ToLane], None],
        draw_ticket: Callable[[], bytes],
    ):
        self._lanes, self._say, self._draw_ticket = lanes, say, draw_ticket
        self._next = 0  # begins with the first hold
        self._open: dict[int, Claim] = {}
        self.told: list[tuple[int, Claim | SeracError]] = []

    def open(self, request: Request, blocks: int, now: float, max_wait_s: float) -> int:
        """Have a prompt of so many blocks computed and held. Raises Unavailable, ResourceExhausted."""
        here = [lane for lane in self._lanes.values() if not lane.retired]
        lanes = [lane for lane in here if lane.role != "decode"] or here
        if not lanes:
            raise Unavailable("replica: no lane is ready; try again later")
        length = len(request.prompt_ids)
        lane = min(lanes, key=lambda lane: lane.wait_s(length, blocks))
        admit(now, max_wait_s, request.deadline_at, lane.wait())
        self._next = self._next or FIRST + int.from_bytes(self._draw_ticket()[:8], "big") % FIRST
        number, ticket = self._next, self._draw_ticket()
        alone = replace(
            request, sampling=Sampling(temperature=0.0), stopping=Stopping(max_tokens=1), deadline_at=None
        )
        self._next += 1
        lane.queued += length
        self._open[number] = Claim(lane.name, number, ticket)
        self._say(lane.name, Prefill(number, "", alone, ticket))
        return number

    def close(self, number: int, reason: str = "abort") -> None:
        """Nobody waits for it any more; what is held already goes by its lease."""
        if (claim := self._open.pop(number, None)) is not None:
            self._say(claim.lane, Cancel((), number, reason))

    def hear(self, message: Held | Failed) -> None:
        """What a lane says of a prompt."""
        if (claim := self._open.pop(message.handoff, None)) is None:
            return
        if isinstance(message, Held):
            self.told.append((message.handoff, claim))
        else:
            error = message.error or Unavailable(f"replica: the prompt was lost: {message.reason}")
            self.told.append((message.handoff, error))

    def count(self, lane: str) -> int:
        """How many prompts it computes for others."""
        return sum(claim.lane == lane for claim in self._open.values())

    def lost(self, lane: str) -> None:
        """A lane is gone with all it held."""
        for number, claim in list(self._open.items()):
            if claim.lane == lane:
                del self._open[number]
                self.told.append((number, Unavailable(f"replica: lane {lane} was lost; try again")))
