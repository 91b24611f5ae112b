"""Which lanes serve a request, what its choices have drawn, and what to do when a lane is lost.

    submit -> admit -> place: one lane     Submit  -> lane              (whom to refuse: engine/core/admission.py)
              or prefill + decode lane     Prefill -> source, Expect -> target      (engine/core/handoff.py)
    lane lost | handoff failed -> the choices that still run go on elsewhere, from the tokens they have drawn
    Over | cancel | deadline | finish -> one terminal event a choice

    retire -> nothing new there      no other lane -> parked until one is up, new ones no longer than they may wait

All choices of a request start in one leg (engine/core/journeys.py), to share the prompt; after a loss each goes on
in a leg of its own. Each attempt has serials of its own, so whatever an earlier one still says is unknown here.
Tokens are taken only at the position that comes next. Where to place is engine/core/placement.py's to say.

Pure: `now` is an argument, messages go to `outbox`.
Cost: one hash a block of a prompt when there are several lanes; a dict lookup a token.
"""

import heapq
import math
import secrets
from collections.abc import Callable

from engine.core import messages, placement, prefix
from engine.core.admission import Lane, admit, least_wait
from engine.core.blocks import Content
from engine.core.directory import Directory, Reader
from engine.core.events import Emission
from engine.core.holds import Claim, Holds
from engine.core.journeys import Drawn, Ended, Event, Journey, Leg, Scored, Started, Track
from engine.core.messages import Blocks, Cancel, Expect, Failed, Fence, Hold, Load, Meet, Prefill, Prefixes, Submit
from engine.core.request import Request, Sampling, Stopping
from engine.core.roles import Role
from engine.core.sequence import Part
from engine.core.whereabouts import Whereabouts
from engine.errors import DeadlineExceeded, SeracError, Unavailable

MOST_LOSSES = 8  # attempts that ended with their lane, until the request counts as the cause


def random_ticket() -> bytes:
    """Nobody can guess it, and no handoff has had it before."""
    return secrets.token_bytes(16)


class Router:
    """Requests over the lanes of one replica. Not thread-safe: one thread calls it."""

    def __init__(
        self,
        block_size: int,
        context: int,
        eos_ids: tuple[int, ...] = (),
        root: bytes = b"",
        draw_ticket: Callable[[], bytes] = random_ticket,
    ):
        self.lanes: dict[str, Lane] = {}
        self.outbox: list[tuple[str, messages.ToLane]] = []
        self.events: list[Event] = []
        self.journeys: dict[Journey, None] = {}
        self.max_wait_s = math.inf  # a new request that would wait longer for its first token is refused
        self.recoveries = self.handoffs = self.gaps = 0
        self._block_size, self._draw_ticket = block_size, draw_ticket
        self._context, self._eos_ids = context, eos_ids
        self._legs: dict[int, Leg] = {}  # by serial and by handoff
        self._tracks: dict[int, Track] = {}  # by serial
        self._serial, self._now = 0, 0.0
        self._deadlines: list[tuple[float, int]] = []  # with the number of a journey
        self._due: dict[int, Journey] = {}  # open journeys with a deadline, by number
        self._where = Whereabouts(block_size, root)
        self._parked: list[tuple[float, list[Track]]] = []  # since when no lane takes them
        self._returning: set[str] = set()  # lanes that were retired, until who did it knows of the next life
        self.directory = Directory(prefix.start(root, "", b""))
        self.holds = Holds(self.lanes, self._to, draw_ticket)

    # -- requests -------------------------------------------------------------------------------------------------

    def submit(self, request: Request, seed: int, now: float, claim: Claim | None = None) -> Journey:
        """Serve a request that was checked; its prompt's KV may be held elsewhere, for who shows `claim`.

        Raises Unavailable when no lane is there, ResourceExhausted.
        """
        if not self.ready:
            raise Unavailable("replica: no lane is ready; try again later")
        self._run(now)
        length = len(request.prompt_ids)
        decoding, prefilling = placement.pools(self.lanes.values(), request, length)
        may = placement.may_serve_alone
        alone = [lane for lane in decoding if may(lane, length, prefilling, self._block_size)]
        if decoding:
            admit(now, self.max_wait_s, request.deadline_at, least_wait(alone, prefilling, decoding))
        journey = Journey(request, seed)
        journey.tracks = [Track(journey, choice) for choice in range(request.sampling.n)]
        self.journeys[journey] = None
        if request.deadline_at is not None:
            journey.number = self._number()
            self._due[journey.number] = journey
            heapq.heappush(self._deadlines, (request.deadline_at, journey.number))
        scored = request.sampling.prompt_logprobs is not None
        if claim is None or claim.handoff in self._legs or scored or not decoding:
            self._place(journey.tracks)
        else:
            self._claim(journey, claim)
        return journey

    def offer(self, request: Request, now: float) -> int:
        """Have a prompt computed and held for a lane of another replica; `holds.told` says when."""
        self._run(now)
        return self.holds.open(request, -(-len(request.prompt_ids) // self._block_size), now, self.max_wait_s)

    def cancel(self, journey: Journey, reason: str = "abort", error: SeracError | None = None) -> None:
        """End every choice that still runs; again is nothing."""
        for track in journey.tracks:
            self.end(track, reason, error=error)

    def end(self, track: Track, reason: str, stop: int | None = None, error: SeracError | None = None) -> None:
        """The terminal of one choice, and the end of its work wherever it is."""
        if track.over:
            return
        leg = self._legs.get(track.serial)
        self._close(track)
        self.events.append(Ended(track, reason, stop, error))
        if leg is not None:
            handoff = 0 if leg.serials else leg.handoff
            self._to(leg.target, Cancel((track.serial,), handoff, reason))
            if handoff:
                self._to(leg.source, Cancel((), handoff, reason))
                self._left(leg.source, handoff)

    def hold(self, journey: Journey, held: bool) -> None:
        """Pause a request whose client does not read, or let it go on."""
        journey.held = held
        for leg in {id(leg): leg for t in journey.tracks if (leg := self._legs.get(t.serial)) is not None}.values():
            self._to(leg.target, Hold(leg.serials, held))

    # -- lanes ----------------------------------------------------------------------------------------------------

    def lane_up(self, name: str, role: Role) -> None:
        """A lane is ready."""
        self.lanes[name] = Lane(name, role)
        if self.directory.read:
            self._to(name, Prefixes(True, False))
        parked, self._parked = self._parked, []
        for _, tracks in parked:
            self._place([track for track in tracks if not track.over])

    @property
    def ready(self) -> bool:
        """Whether a lane is there, or will be soon."""
        return bool(self.lanes or self._returning)

    def retire(self, name: str) -> None:
        """Place nothing new on a lane; what it serves goes on. Until `returned`, its next life is waited for."""
        self.lanes[name].retired = True
        self._returning.add(name)

    def returned(self, name: str) -> None:
        """A lane that was retired is there again under another name, or nobody waits for it any more."""
        self._returning.discard(name)

    def serves(self, name: str) -> int:
        """Choices and prompts that are placed on a lane."""
        lane = self.lanes.get(name)
        return 0 if lane is None else len(lane.placed) + len(lane.drawing) + self.holds.count(name)

    def set_role(self, name: str, role: Role) -> None:
        """Place requests on a lane by another role from now on; what it serves goes on there."""
        if name in self.lanes:
            self.lanes[name].role = role

    def lane_lost(self, name: str) -> None:
        """A lane's process is gone or cut off: what it served goes on elsewhere."""
        if (lane := self.lanes.pop(name, None)) is None:
            return
        self.directory.lost(name)
        self.holds.lost(name)
        for other in self.lanes:
            self._to(other, Fence(name))
        hit = [leg for leg in self._legs.values() if leg.target == name or (leg.source == name and leg.handoff)]
        for leg in {id(leg): leg for leg in hit}.values():
            self._again(leg, f"lane {name} was lost", blame=not lane.retired)

    def receive(self, lane: str, message: messages.ToFront) -> None:
        """Take in what a lane says."""
        match message:
            case Emission():
                self._emission(message)
            case messages.Over(serial=serial) if (track := self._tracks.get(serial)) is not None:
                self._over(track, message)
            case messages.Started():
                self._started(message)
            case messages.Scored(serial=serial) if (track := self._tracks.get(serial)) is not None:
                self._scored(track, message)
            case messages.Committed(handoff=number) if (leg := self._legs.get(number)) is not None:
                if (source := self.lanes.get(leg.source)) is not None:
                    source.drew(number)
                self._left(leg.source, number)
                self._committed(leg)
            case messages.Held() | Failed():
                self._failed(message)
            case Load() if (view := self.lanes.get(lane)) is not None:
                view.load, view.queued = message, 0
            case Blocks() if lane in self.lanes and self.directory.read:
                self.directory.receive(lane, message)

    # -- what can be found by prefix ------------------------------------------------------------------------------

    def read_blocks(self, wake: Callable[[], None]) -> tuple[Reader, list[Content]]:
        """A reader of the lanes' blocks, and those that are known now; lanes tell only while somebody reads."""
        if not self.directory.read:
            self._to_all(Prefixes(True, False))
        return self.directory.open(wake)

    def close_blocks(self, reader: Reader) -> None:
        """It reads no more."""
        self.directory.close(reader)
        if not self.directory.read:
            self._to_all(Prefixes(False, False))
            for name in self.lanes:
                self.directory.lost(name)

    def forget_blocks(self) -> None:
        """Let nobody find a block that is published now."""
        self._where.forget()
        self._to_all(Prefixes(self.directory.read, True))

    def tick(self, now: float) -> None:
        """End what is past its deadline, wherever it is."""
        self._run(now)
        while self._deadlines and self._deadlines[0][0] <= now:
            if (journey := self._due.get(heapq.heappop(self._deadlines)[1])) is not None:
                self.cancel(journey, "deadline", DeadlineExceeded("deadline: passed before the request was done"))
        self._tire()

    def _tire(self) -> None:
        """End requests that have drawn nothing when no lane has taken them for as long as one may wait."""
        self._parked = [entry for entry in self._parked if not all(track.over for track in entry[1])]
        for since, tracks in self._parked:
            for track in tracks if self._now - since > self.max_wait_s else ():
                if not (track.over or track.tokens):
                    words = f"max_wait: no lane was ready within {self.max_wait_s:.3g} s; try again later"
                    self.end(track, "error", error=Unavailable(words))

    def _run(self, now: float) -> None:
        for lane in self.lanes.values():
            lane.run(now - self._now)
        self._now = now

    def _started(self, started: messages.Started) -> None:
        leg = self._legs.get(started.serial)
        track = self._tracks.get(started.serial) or (leg.tracks[0] if leg is not None else None)
        if track is not None and not (leg is not None and leg.source and started.serial in leg.serials):
            self.events.append(Started(track, started.cached))

    def _emission(self, emission: Emission) -> None:
        entries = []
        columns = emission.serials.tolist(), emission.positions.tolist(), emission.tokens.tolist()
        for k, (serial, position, token) in enumerate(zip(*columns, strict=True)):
            track = self._tracks.get(serial)
            if track is None:
                continue
            wanted = len(track.journey.request.prompt_ids) + len(track.tokens)
            if position == wanted:
                track.tokens.append(token)
                entries.append((k, track))
                if (lane := self.lanes.get(self._legs[serial].target)) is not None and serial in lane.placed:
                    lane.drew(serial)
            elif position > wanted:  # a token is missing: what follows would be wrong
                self.gaps += 1
                self._again(self._legs[serial], "a token is missing")
        if entries:
            self.events.append(Drawn(emission, entries))

    def _scored(self, track: Track, scores: messages.Scored) -> None:
        known = track.scored + 1 - scores.first
        if known < 0:
            self.gaps += 1
            self._again(self._legs[track.serial], "a score is missing")
        elif known < len(scores.logprob):
            track.scored = scores.first + len(scores.logprob) - 1
            self.events.append(Scored(track, scores.after(known)))

    def _over(self, track: Track, over: messages.Over) -> None:
        self._close(track)
        self.events.append(Ended(track, over.reason, over.stop, over.error))

    def _committed(self, leg: Leg) -> None:
        leg.handoff = 0
        self._where.remember(leg.target, leg.chain)
        if leg.tracks[0].journey.held:  # the lane knew none of the choices when it was said first
            self._to(leg.target, Hold(leg.serials, True))

    def _failed(self, failed: messages.Held | Failed) -> None:
        """A handoff came to nothing, or one for another replica as far as it goes here."""
        if (leg := self._legs.get(failed.handoff)) is None or isinstance(failed, messages.Held):
            self.holds.hear(failed)
        elif failed.error is None:
            self._again(leg, failed.reason)
        else:
            for track in leg.tracks:
                self.end(track, "deadline" if failed.reason == "deadline" else "error", error=failed.error)

    # -- placing --------------------------------------------------------------------------------------------------

    def _again(self, leg: Leg, reason: str, blame: bool = True) -> None:
        """Give an attempt up and go on from what was drawn, each choice for itself; `blame` counts a loss."""
        serials = leg.serials
        for name in {leg.target, leg.source} & self.lanes.keys():
            self._to(name, Cancel(serials, leg.handoff, reason))
        self._left(leg.source, leg.handoff)
        for track in leg.tracks:
            self._left(leg.target, track.serial)
            self._tracks.pop(track.serial, None)
            if track.over:
                continue
            track.losses += blame
            if track.losses > MOST_LOSSES:
                error = Unavailable(f"replica: {MOST_LOSSES} attempts failed, the last one because {reason}")
                self.end(track, "error", error=error)
            elif (last := self._finished(track)) is not None:  # only its terminal was lost
                self.end(track, *last)
            else:
                self.recoveries += 1
                self._place([track])

    def _finished(self, track: Track) -> tuple[str, int | None] | None:
        """(reason, stop) of a choice that has drawn all it may."""
        request = track.journey.request
        stopping, length = request.stopping, len(request.prompt_ids) + len(track.tokens)
        if not track.tokens:
            return None
        last = track.tokens[-1]
        if last in stopping.stop_token_ids or (last in self._eos_ids and not stopping.ignore_eos):
            return "stop", last
        full = self._context if stopping.max_tokens is None else len(request.prompt_ids) + stopping.max_tokens
        return ("length", None) if length >= full else None

    def _place(self, tracks: list[Track]) -> None:
        if not tracks:
            return
        journey, first = tracks[0].journey, tracks[0]
        request, tokens = journey.request, (*journey.request.prompt_ids, *first.tokens)
        decoding, prefilling = placement.pools(self.lanes.values(), request, len(tokens))
        if not decoding:
            self._parked.append((self._now, tracks))
            return
        chain = self._chain(request, tokens)
        source, target = placement.choose(self._where, decoding, prefilling, len(tokens), chain, self._block_size)
        leg = Leg(tracks, target.name)
        cached = self._where.cached((source or target).name, chain)
        for track in tracks:
            track.serial = self._number()
            self._legs[track.serial], self._tracks[track.serial] = leg, track
            target.place(track.serial, len(tokens) - cached if source is None and track is first else 0)
        parts = tuple(Part(track.serial, track.choice, tuple(track.tokens)) for track in tracks)
        submit = Submit(request, journey.seed, parts)
        if source is None:
            target.queued += len(tokens) - cached
            self._where.remember(target.name, chain)
            self._to(target.name, submit)
        else:
            leg.chain = chain
            self._hand_off(leg, source, submit, tokens)
            source.queued += len(tokens) - cached
            source.place(leg.handoff, len(tokens) - cached)
            self._where.remember(source.name, chain)
        if journey.held:
            self._to(target.name, Hold(leg.serials, True))

    def _claim(self, journey: Journey, claim: Claim) -> None:
        """Serve on the lane that waits least, which fetches the prompt's KV from whoever holds it."""
        request, length = journey.request, len(journey.request.prompt_ids)
        blocks = -(-length // self._block_size)
        decoding, _ = placement.pools(self.lanes.values(), request, length)
        target = min(decoding, key=lambda lane: lane.wait_s(1, blocks))
        leg = Leg(journey.tracks, target.name, claim.lane, claim.handoff, self._chain(request, request.prompt_ids))
        self._legs[claim.handoff] = leg
        for track in journey.tracks:
            track.serial = self._number()
            self._legs[track.serial], self._tracks[track.serial] = leg, track
            target.place(track.serial, 1 if track is journey.tracks[0] else 0)
        self.handoffs += 1
        parts = tuple(Part(track.serial, track.choice) for track in journey.tracks)
        self._to(target.name, Meet(claim.lane, claim.addresses, claim.tp, True))
        submit = Submit(request, journey.seed, parts)
        self._to(target.name, Expect(claim.handoff, claim.lane, submit, claim.ticket, held=True))

    def _hand_off(self, leg: Leg, source: Lane, submit: Submit, tokens: tuple[int, ...]) -> None:
        self.handoffs += 1
        leg.source, leg.handoff = source.name, self._number()
        self._legs[leg.handoff] = leg
        given = submit.request
        prompt = Request(
            given.request_id,
            tokens,
            Sampling(temperature=0.0),
            Stopping(max_tokens=1),
            given.deadline_at,
            given.salt,
            given.adapter,
        )
        ticket = self._draw_ticket()
        self._to(leg.target, Expect(leg.handoff, source.name, submit, ticket))
        self._to(source.name, Prefill(leg.handoff, leg.target, prompt, ticket))

    def _chain(self, request: Request, tokens: tuple[int, ...]) -> list[bytes]:
        return self._where.chain(request, tokens) if len(self.lanes) > 1 else []

    def _close(self, track: Track) -> None:
        track.over = True
        self._tracks.pop(track.serial, None)
        if (leg := self._legs.get(track.serial)) is not None:
            self._left(leg.target, track.serial)
        if all(other.over for other in track.journey.tracks):
            self.journeys.pop(track.journey, None)
            self._due.pop(track.journey.number, None)

    def _left(self, name: str, number: int) -> None:
        """A choice or a handoff is over on a lane."""
        self._legs.pop(number, None)
        if (lane := self.lanes.get(name)) is not None:
            lane.leave(number)

    def _number(self) -> int:
        self._serial += 1
        return self._serial

    def _to(self, lane: str, message: messages.ToLane) -> None:
        if lane in self.lanes:
            self.outbox.append((lane, message))

    def _to_all(self, message: messages.ToLane) -> None:
        for name in self.lanes:
            self._to(name, message)

    def check(self) -> None:
        """Assert that every open choice has one attempt or is parked. For tests and idle moments."""
        parked = {track for _, tracks in self._parked for track in tracks if not track.over}
        for journey in self.journeys:
            assert any(not track.over for track in journey.tracks)
            for track in journey.tracks:
                assert track.over or track in parked or self._tracks.get(track.serial) is track
        assert all(leg.target in self.lanes for leg in self._legs.values())
        assert all(track.serial in self._legs for track in self._tracks.values())
        placed = {number for lane in self.lanes.values() for number in (*lane.placed, *lane.drawing)}
        claimed = {leg.handoff for leg in self._legs.values() if leg.handoff and leg.source not in self.lanes}
        assert placed == self._legs.keys() - claimed, "a lane counts other work than is open"
