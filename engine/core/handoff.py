"""The move of one prompt's KV from the lane that computed it to the lane that decodes, as two state machines.

                     <--- Withdrawn ---
    target    OFFERED --Offer, room--> RESERVED --part--> COPYING --last part--> COMMITTED --Released--> RELEASED
                 |                        |                  |
                 +--cancel--> ABORTED     cancel, bad, stalled --> QUARANTINED --Stopped | fence--> ABORTED

    source    OFFERED --seated: Offer, Fetch--> COPYING --Done--> RELEASED      cancel, Stop, lease over --> ABORTED

A source offers a prompt when that has got its blocks, before it is computed; a target reserves when it has room
then, so it never holds blocks for what waits for blocks elsewhere. The target pulls: a Fetch, with the ticket that
the router gave to both for this one handoff, allows the source to send `num_blocks` blocks from `first` on, as they
are computed. The target takes only the part that begins at its next block and bears its present generation; each
time it asks again, after silence or a bad part, the generation goes up, so that no late part of an earlier asking
can land. Blocks are reserved before anything is asked for and stay WRITING until no byte can land in them any more.
A message may be lost, doubled, late, out of order or bad: every message but a part may be said again without harm,
and whoever waits for an answer asks again.

A source may be made without a target: its prompt is computed first, and the lane that shows the ticket first gets
it (`Source.admits`). That target claims what a lane of another cluster holds, of whose death nobody tells it: it
gives up soon, and its blocks leave quarantine once the source's lease must be over.

Pure: `now` is an argument, messages are returned, blocks are the caller's (engine/core/agent.py).
Source: DESIGN.md, "The handoff"; RELIABILITY.md 2.3, rules R1-R7.
"""

from dataclasses import dataclass
from enum import Enum
from hmac import compare_digest
from typing import NamedTuple

CREDIT = 32  # blocks that a target asks for ahead
ASK_AGAIN_S = 0.25  # first wait for an answer; doubles up to ASK_AT_LEAST_S
ASK_AT_LEAST_S = 2.0
MAX_BAD = 3  # parts in a row whose bytes are not what their checksum says
STALLED_S = 60.0  # a target without any progress gives up
CLAIM_S = 5.0  # the same, where the source had everything before it was asked
LEASE_S = 30.0  # a source that has blocks, and whose target says nothing, lets go


class State(Enum):
    """Where a handoff is, as one side sees it."""

    OFFERED = "offered"
    RESERVED = "reserved"
    COPYING = "copying"
    COMMITTED = "committed"
    RELEASED = "released"
    ABORTED = "aborted"
    QUARANTINED = "quarantined"


OVER = (State.RELEASED, State.ABORTED)


class Offer(NamedTuple):
    """Source to target: the prompt has its blocks here, ask for them when you have room."""

    handoff: int


class Later(NamedTuple):
    """Target to source: your offer is known, there is no room yet."""

    handoff: int


class Fetch(NamedTuple):
    """Target to source: send these blocks as soon as they are computed. `ticket` is 16 bytes, the handoff's."""

    handoff: int
    generation: int
    first: int
    num_blocks: int
    ticket: bytes = b""


class Parts(NamedTuple):
    """Source to target: the KV of `num_blocks` blocks. `staged` is None where the bytes came damaged."""

    handoff: int
    generation: int
    first: int
    num_blocks: int
    staged: object | None


class Withdrawn(NamedTuple):
    """Source to target: no such asking is served, the blocks that were offered are gone; I offer again."""

    handoff: int
    generation: int


class Done(NamedTuple):
    """Target to source: everything is mine, let go."""

    handoff: int


class Stop(NamedTuple):
    """Target to source: send nothing more."""

    handoff: int


class Stopped(NamedTuple):
    """Source to target: nothing of this handoff leaves from now on. `answer` says what it found.

    answer   cancelled (it was under way), complete (it was over) or unknown
    """

    handoff: int
    answer: str


class Released(NamedTuple):
    """Source to target: my blocks are free."""

    handoff: int


class Gone(NamedTuple):
    """Source to target: this cannot be served any more; `reason` in words."""

    handoff: int
    reason: str


Message = Offer | Later | Fetch | Withdrawn | Parts | Done | Stop | Stopped | Released | Gone


@dataclass(slots=True)
class Target:
    """The receiving side. `total` blocks, the first `have` of them are here already."""

    handoff: int
    source: str
    total: int
    state: State = State.OFFERED
    generation: int = 0
    have: int = 0
    asked: int = 0  # end of what was asked for
    bad: int = 0
    offered: bool = False  # the source has said so
    ticket: bytes = b""
    reason: str = ""
    ask_at: float = float("inf")
    wait_s: float = ASK_AGAIN_S
    moved_at: float = 0.0
    claims: bool = False  # what was held for whoever comes first

    def reserved(self, now: float, have: int) -> list[Message]:
        """Blocks are held, `have` of them found by prefix."""
        assert self.state is State.OFFERED and self.offered
        self.state, self.have, self.moved_at = State.RESERVED, have, now
        return self._commit(now) if have == self.total else self._ask(now)

    def receive(self, now: float, message: Message) -> tuple[bool, list[Message]]:
        """(whether the part may be written, what to answer). What is late, doubled or foreign changes nothing."""
        match message:
            case Offer() if self.state is State.OFFERED:
                known, self.offered = self.offered, True
                return False, [Later(self.handoff)] if known else []
            case Withdrawn(generation=self.generation) if self.state is State.RESERVED:
                return False, self._withdrawn()
            case Parts() if self.state in (State.RESERVED, State.COPYING):
                return self._part(now, message)
            case Gone(reason=reason) if self.state in (State.RESERVED, State.COPYING):
                self.state, self.reason = State.ABORTED, reason  # the source sends nothing after it
            case Stopped() | Gone() if self.state is State.QUARANTINED:
                self.state = State.ABORTED
            case Released() | Gone() | Stopped() if self.state is State.COMMITTED:
                self.state = State.RELEASED
        return False, []

    def _withdrawn(self) -> list[Message]:
        if self.claims:
            self.state, self.reason = State.ABORTED, "its blocks were given to others"
            return [Stop(self.handoff)]
        self.state, self.offered, self.have, self.ask_at = State.OFFERED, False, 0, float("inf")
        return []

    def _part(self, now: float, part: Parts) -> tuple[bool, list[Message]]:
        wanted = self.generation, self.have
        if (part.generation, part.first) != wanted or part.num_blocks > self.asked - self.have:
            return False, []
        if part.staged is None:
            self.bad += 1
            if self.bad >= MAX_BAD:
                return False, self.cancel(now, f"{self.bad} parts in a row came damaged")
            return False, self._ask(now)
        self.state, self.bad, self.moved_at = State.COPYING, 0, now
        self.have += part.num_blocks
        self.wait_s, self.ask_at = ASK_AGAIN_S, now + ASK_AGAIN_S
        if self.have == self.total:
            return True, self._commit(now)
        if self.asked - self.have <= CREDIT // 2 and self.asked < self.total:
            return True, [self._credit()]
        return True, []

    def _credit(self) -> Fetch:
        self.asked = min(self.have + CREDIT, self.total)
        return Fetch(self.handoff, self.generation, self.have, self.asked - self.have, self.ticket)

    def _ask(self, now: float) -> list[Message]:
        self.generation += 1
        self.ask_at, self.wait_s = now + self.wait_s, min(2 * self.wait_s, ASK_AT_LEAST_S)
        return [self._credit()]

    def _commit(self, now: float) -> list[Message]:
        self.state, self.wait_s, self.ask_at, self.moved_at = State.COMMITTED, ASK_AGAIN_S, now + ASK_AGAIN_S, now
        return [Done(self.handoff)]

    def tick(self, now: float) -> list[Message]:
        """Ask again where an answer is overdue."""
        if now < self.ask_at or self.state in OVER:
            return []
        if self.state is State.QUARANTINED:
            if self.claims and now - self.moved_at > STALLED_S:
                self.state = State.ABORTED  # the source's lease is over by now
                return []
        elif now - self.moved_at > (CLAIM_S if self.claims else STALLED_S):
            if self.state is State.COMMITTED:
                self.state = State.RELEASED  # the source's lease is over by now
                return []
            return self.cancel(now, "no progress")
        if self.state in (State.RESERVED, State.COPYING):
            return self._ask(now)
        self.ask_at, self.wait_s = now + self.wait_s, min(2 * self.wait_s, ASK_AT_LEAST_S)
        return [Done(self.handoff) if self.state is State.COMMITTED else Stop(self.handoff)]

    def cancel(self, now: float, reason: str) -> list[Message]:
        """Give up. Reserved blocks stay with the handoff until the source says that nothing is on its way."""
        if self.state is State.OFFERED:
            self.state, self.reason = State.ABORTED, reason
            return [Stop(self.handoff)]
        if self.state in (State.RESERVED, State.COPYING):
            self.state, self.reason = State.QUARANTINED, reason
            self.wait_s, self.ask_at = 2 * ASK_AGAIN_S, now + ASK_AGAIN_S
            return [Stop(self.handoff)]
        return []

    def fence(self, reason: str) -> None:
        """The source's process is gone or cut off: nothing it still sends is taken."""
        if self.state is State.COMMITTED:
            self.state = State.RELEASED
        elif self.state not in OVER:
            self.state, self.reason = State.ABORTED, self.reason or reason


@dataclass(slots=True)
class Source:
    """The sending side: `ready` of its `total` blocks are computed, all are there once it is `seated`."""

    handoff: int
    target: str
    total: int
    state: State = State.OFFERED
    ready: int = 0
    sent: int = 0
    allowed: int = 0  # end of what the target asked for
    generation: int = 0
    seated: bool = False
    ticket: bytes = b""
    reason: str = ""
    ask_at: float = 0.0
    wait_s: float = ASK_AGAIN_S
    heard_at: float = 0.0

    def admits(self, sender: str, message: Message) -> bool:
        """Whether `sender` is its target; where there is none yet, he becomes it who shows the ticket."""
        if not self.target and isinstance(message, Fetch) and compare_digest(message.ticket, self.ticket):
            self.target = sender
        return self.target == sender

    def computed(self, now: float, ready: int) -> list[Message]:
        """The prompt has its blocks, `ready` of them computed."""
        self.ready = ready
        if not self.target:
            self.heard_at = now  # its lease begins when all is computed
        if self.seated:
            return []
        self.seated, self.wait_s, self.ask_at, self.heard_at = True, ASK_AGAIN_S, now, now
        return self.tick(now)

    def unseated(self) -> None:
        """The prompt has lost its blocks, and waits for others."""
        self.seated, self.ready = False, 0

    def receive(self, now: float, message: Message) -> list[Message]:
        """What to answer; `next_parts` says what may be sent afterwards."""
        self.heard_at = now
        match message:
            case Fetch():
                return self._fetch(message)
            case Done():
                self.state = State.RELEASED
                return [Released(self.handoff)]
            case Stop():
                answer = "complete" if self.state in OVER else "cancelled"
                self.cancel("the target stopped")
                return [Stopped(self.handoff, answer)]
        return []

    def _fetch(self, fetch: Fetch) -> list[Message]:
        if not compare_digest(fetch.ticket, self.ticket):
            return []
        if self.state in OVER:
            return [Gone(self.handoff, self.reason or "it is over")]
        if self.state is State.OFFERED:
            if fetch.generation <= self.generation:  # withdrawn
                return []
            if not self.seated:
                self.generation = fetch.generation
                return [Withdrawn(self.handoff, fetch.generation)]
        self.state = State.COPYING
        stop = fetch.first + fetch.num_blocks
        if fetch.generation > self.generation:
            self.generation, self.sent, self.allowed = fetch.generation, fetch.first, stop
        elif fetch.generation == self.generation:
            self.allowed = max(self.allowed, stop)
        return []

    def next_parts(self, most: int) -> tuple[int, int] | None:
        """(first, count) of the blocks to send now, at most `most`; they count as sent."""
        if self.state is not State.COPYING:
            return None
        first, stop = self.sent, min(self.ready, self.allowed, self.total, self.sent + most)
        if stop <= first:
            return None
        self.sent = stop
        return first, stop - first

    def cancel(self, reason: str) -> None:
        """Send nothing more."""
        if self.state not in OVER:
            self.state, self.reason = State.ABORTED, reason

    def tick(self, now: float) -> list[Message]:
        """Offer again; let go where the target says nothing at all, and tell whoever asks later."""
        offers = self.state is State.OFFERED and self.seated
        if (offers or self.state is State.COPYING) and now - self.heard_at > LEASE_S:
            self.cancel("its lease is over")
        elif offers and self.target and now >= self.ask_at:
            self.ask_at, self.wait_s = now + self.wait_s, min(2 * self.wait_s, ASK_AT_LEAST_S)
            return [Offer(self.handoff)]
        return []
