"""A lane as others see it: messages in, plans, device work and messages out.

    receive(message) -+-> Scheduler: plan, collect ---> events ---> outbox  (to the front, to other lanes)
                      +-> Target, Source: handoffs -----> work       (gather and scatter, in order with steps)

The loop of a lane and the simulator drive this same class. Device work is listed, not done: `work` is run in order
before the next plan is launched, and the device keeps that order. So a gather reads what the steps before it wrote,
a scatter is there for the steps after it, and blocks may be given back once the work that names them is listed.
Cost: one pass over the open handoffs a turn, beside the scheduler's.
"""

from collections import Counter, OrderedDict
from typing import NamedTuple

from engine.core import arrivals, events, handoff
from engine.core.blocks import News
from engine.core.handoff import OVER, Fetch, Offer, Parts, Source, State, Stop, Stopped, Target
from engine.core.messages import (
    FRONT,
    Blocks,
    Cancel,
    Committed,
    Expect,
    Failed,
    Fence,
    Held,
    Hold,
    Load,
    Meet,
    Over,
    Prefill,
    Prefixes,
    Scored,
    Started,
    Submit,
    ToFront,
    ToLane,
)
from engine.core.plan import StepPlan, StepResult
from engine.core.scheduler import Scheduler
from engine.core.sequence import Sequence

PART_BLOCKS = 16  # most blocks in one part, unless the lane says otherwise
EARLY = 256  # offers that came before the front's word of them, kept for it
TOLD = 1024  # most blocks in one message to the front
REMEMBERED = 1024  # handoffs that are over, kept to answer late questions


class Gather(NamedTuple):
    """Read blocks and send them; `part.staged` is what the device reads."""

    peer: str
    part: Parts
    blocks: list[int]


class Scatter(NamedTuple):
    """Write what came into blocks."""

    blocks: list[int]
    staged: object


class Agent:
    """One lane's brain with its handoffs. Not thread-safe: one thread calls it."""

    def __init__(self, name: str, scheduler: Scheduler, part_blocks: int = PART_BLOCKS):
        self.name, self.scheduler = name, scheduler
        self._part_blocks = part_blocks
        self.outbox: list[tuple[str, ToFront | handoff.Message]] = []
        self.work: list[Gather | Scatter] = []
        self.targets: dict[int, Target] = {}
        self.sources: dict[int, Source] = {}
        self.moved_blocks = self.steps = self.asked_again = 0
        self._expected: dict[int, Expect] = {}
        self._prompts: dict[int, Sequence] = {}  # what `sources` read from
        self._early: OrderedDict[int, str] = OrderedDict()  # offers: who made them
        self._over: OrderedDict[int, str] = OrderedDict()  # sources that are over, with the reason
        self._now = 0.0

    # -- what others say ------------------------------------------------------------------------------------------

    def receive(self, now: float, sender: str, message: ToLane | handoff.Message) -> None:
        """Take in a message from the front or from lane `sender`."""
        self._now = now
        match message:
            case Submit():
                self.scheduler.submit(*message)
            case Expect():
                self._expect(message)
            case Prefill():
                self._prefill(message)
            case Cancel():
                self._cancel(now, message)
            case Hold():
                self._hold(message)
            case Fence(lane=lane):
                self._fence(lane)
            case Meet():
                pass  # for whoever runs the links
            case Prefixes():
                self._tell_blocks(message.tell, message.forget)
            case handoff.Later() | Fetch() | handoff.Done() | Stop():
                self._to_source(now, sender, message)
            case _:
                self._to_target(now, sender, message)

    def _expect(self, message: Expect) -> None:
        tokens = _known(message.submit)
        total = -(-(tokens - 1) // self.scheduler.shape.block_size)
        self._expected[message.handoff] = message
        target = Target(message.handoff, message.source, total, ticket=message.ticket, claims=message.held)
        target.offered = self._early.pop(message.handoff, None) == message.source or message.held
        self.targets[message.handoff] = target

    def _prefill(self, message: Prefill) -> None:
        number = message.handoff
        total = -(-(len(message.request.prompt_ids) - 1) // self.scheduler.shape.block_size)
        self._prompts[number] = arrivals.prefill(self.scheduler, message.request, number)
        self.sources[number] = Source(number, message.target, total, ticket=message.ticket)

    def _cancel(self, now: float, message: Cancel) -> None:
        for serial in message.serials:
            if (sequence := self.scheduler.live.get(serial)) is not None:
                self.scheduler.cancel(sequence, message.reason)
        for number, expected in self._expected.items():  # those that have not begun
            parts = tuple(part for part in expected.submit.parts if part.serial not in message.serials)
            if len(parts) < len(expected.submit.parts):
                self._expected[number] = expected._replace(submit=expected.submit._replace(parts=parts))
            if not parts or number == message.handoff:
                target = self.targets[number]
                self._send(target.source, target.cancel(now, message.reason))
        if (source := self.sources.get(message.handoff)) is not None:
            source.cancel(message.reason)

    def _hold(self, message: Hold) -> None:
        for serial in message.serials:
            if (sequence := self.scheduler.live.get(serial)) is not None:
                self.scheduler.hold(sequence, message.held)

    def _fence(self, lane: str) -> None:
        for target in self.targets.values():
            if target.source == lane:
                target.fence(f"lane {lane} was lost")
        for source in self.sources.values():
            if source.target == lane:
                source.cancel(f"lane {lane} was lost")

    def _to_source(self, now: float, sender: str, message: handoff.Message) -> None:
        number = message.handoff
        if (source := self.sources.get(number)) is not None and source.admits(sender, message):
            self._send(sender, source.receive(now, message))
        elif isinstance(message, Fetch):
            self._send(sender, [handoff.Gone(number, self._over.get(number, "it is over"))])
        elif not isinstance(message, handoff.Later):
            stopped = Stopped(number, "complete" if number in self._over else "unknown")
            self._send(sender, [stopped if isinstance(message, Stop) else handoff.Released(number)])

    def _to_target(self, now: float, sender: str, message: handoff.Message) -> None:
        target = self.targets.get(message.handoff)
        if target is None and isinstance(message, Offer):
            self._early[message.handoff] = sender
            while len(self._early) > EARLY:
                self._early.popitem(last=False)
        if target is None or target.source != sender:
            return
        before = target.have
        write, answers = target.receive(now, message)
        if target.state is State.OFFERED:  # what it was to be filled from is gone
            self.scheduler.reserved.drop(target.handoff)
        if write and isinstance(message, Parts):
            blocks = self.scheduler.reserved.held(target.handoff)[before : target.have]
            self.work.append(Scatter(blocks, message.staged))
            self.moved_blocks += len(blocks)
        self._send(sender, answers)

    # -- a turn ---------------------------------------------------------------------------------------------------

    def plan(self, now: float) -> StepPlan | None:
        """Move the handoffs on, then the next step; run `work` before it is launched."""
        self._now = now
        self._tick(now)
        plan = self.scheduler.plan(now)
        self.steps += plan is not None
        self._take_events()
        return plan

    def collect(self, result: StepResult) -> None:
        """Take in the result of the oldest step in flight."""
        self.scheduler.collect(result)
        self._take_events()

    def fail(self, step: int | None, message: str) -> None:
        """The device failed (in `step`, if one is to blame) and the pool is gone: KV on its way here is lost."""
        self.work.clear()
        for number, target in self.targets.items():
            if number not in self._expected and target.state is not State.QUARANTINED:
                continue
            target.state, target.reason = State.ABORTED, "the device failed"
            self._send(target.source, [Stop(number)])
        told = self.scheduler.pool.news is not None
        self.scheduler.fail(step, message)
        self._tell_blocks(told)
        self._take_events()

    def _tick(self, now: float) -> None:
        scheduler, scheduler.ahead = self.scheduler, None
        for target in list(self.targets.values()):
            offered = target.state is State.OFFERED and target.offered
            if offered and scheduler.ahead is None and not self._reserve(now, target):
                scheduler.ahead = target.handoff
            self._send(target.source, target.tick(now))
            self._settle(target)
        for source in list(self.sources.values()):
            open_before = source.state not in OVER
            self._send(source.target, source.tick(now))
            if open_before and source.state in OVER:
                self._tell(Failed(source.handoff, source.reason))
            self._pump(source)
        hungry = scheduler.waiting.hungry
        while (
            hungry is not None and scheduler.rows.free and scheduler.blocks_for(hungry) > scheduler.pool.available
        ):
            if not self._give_up_after(hungry.serial):
                break

    def _give_up_after(self, number: int) -> bool:
        """Take the blocks of the newest prompt after `number` that nobody has asked for; False if there is none.

        Two lanes that hand prompts to each other would else each fill their pool with what the other cannot take.
        Blocks are waited for in the order of numbers, one for all lanes, so that the first of all can always go on.
        """
        for later in reversed(self.sources):
            sequence = self._prompts[later]
            if later > number and self.sources[later].state is State.OFFERED and sequence.blocks:
                arrivals.give_up(self.scheduler, sequence)
                return True
        return False

    def _reserve(self, now: float, target: Target) -> bool:
        """Hold blocks for `target` and ask for what is missing; False while there is no room."""
        if self.scheduler.suspects:  # tried one after the other, each with the whole pool
            return False
        submit = self._expected[target.handoff].submit
        count = -(-_known(submit) // self.scheduler.shape.block_size)
        while not arrivals.room(self.scheduler, count, target.handoff):
            if not self._give_up_after(target.handoff):
                return False
        tokens = submit.request.prompt_ids + submit.parts[0].emitted
        prefix = arrivals.chain(self.scheduler, submit.request, tokens)
        made = self.scheduler.reserved.reserve(target.handoff, prefix, count)
        assert made is not None, "there is room for all of it, shared or not"
        self._send(target.source, target.reserved(now, made[1]))
        return True

    def _settle(self, target: Target) -> None:
        """Start the choices of a handoff that has everything; forget one that is over."""
        expected = self._expected.get(target.handoff)
        if expected is not None and target.state in (State.COMMITTED, State.RELEASED):
            del self._expected[target.handoff]
            self._tell(Committed(target.handoff))
            if expected.submit.parts:
                blocks = self.scheduler.reserved.written(target.handoff)
                arrivals.adopt(self.scheduler, *expected.submit, blocks, _known(expected.submit) - 1)
            else:
                self.scheduler.reserved.drop(target.handoff)
        gave_up = target.state in OVER or (target.claims and target.state is State.QUARANTINED)
        if gave_up and self._expected.pop(target.handoff, None) is not None:
            self._tell(Failed(target.handoff, target.reason))
        if target.state in OVER:
            self.asked_again += max(target.generation - 1, 0)
            del self.targets[target.handoff]
            self.scheduler.reserved.drop(target.handoff)

    def _pump(self, source: Source) -> None:
        """List what may be sent; forget a source that is over."""
        sequence = self._prompts[source.handoff]
        while (cut := source.next_parts(self._part_blocks)) is not None:
            first, count = cut
            blocks = self.scheduler.blocks_of(sequence)[first : first + count]
            part = Parts(source.handoff, source.generation, first, count, None)
            self.work.append(Gather(source.target, part, blocks))
            self.moved_blocks += count
        if source.state in OVER:
            del self.sources[source.handoff], self._prompts[source.handoff]
            self.scheduler.cancel(sequence, source.reason or "done")
            self._over[source.handoff] = source.reason
            while len(self._over) > REMEMBERED:
                self._over.popitem(last=False)

    def _take_events(self) -> None:
        for event in self.scheduler.take_events():
            match event:
                case events.Emission():
                    self._tell(event)
                case events.Started(sequence=sequence):
                    self._tell(Started(sequence.serial, sequence.cached))
                case events.Computed(sequence=sequence, positions=positions):
                    self._computed(sequence, positions)
                case events.Scored(sequence=sequence):
                    self._tell(Scored(sequence.serial, *(getattr(event, name) for name in Scored.__slots__[1:])))
                case events.Ended(sequence=sequence):
                    self._ended(event, sequence)
        if news := self.scheduler.pool.news:
            self.scheduler.pool.news = []
            self._tell_news(False, news)

    def _tell_blocks(self, told: bool, forget: bool = False) -> None:
        """Tell of all that is published, then of what changes; or of nothing from now on."""
        pool = self.scheduler.pool
        if forget:
            pool.forget_all()
        pool.news = [] if told else None
        if told:
            self._tell_news(True, [(content.key, content) for content in pool.published])

    def _tell_news(self, whole: bool, news: list[News]) -> None:
        for first in range(0, max(len(news), 1), TOLD):
            self._tell(Blocks(whole and first == 0, tuple(news[first : first + TOLD])))

    def _computed(self, sequence: Sequence, positions: int) -> None:
        if (source := self.sources.get(sequence.serial)) is None:
            return
        if sequence.waits:
            source.unseated()
        else:
            size, whole = self.scheduler.shape.block_size, positions == len(sequence.tokens) - 1
            self._send(source.target, source.computed(self._now, source.total if whole else positions // size))
            if whole and not source.target:
                self._tell(Held(source.handoff))

    def _ended(self, event: events.Ended, sequence: Sequence) -> None:
        if not sequence.rests:
            self._tell(Over(sequence.serial, event.reason, event.stop, event.error))
        elif (source := self.sources.get(sequence.serial)) is not None and source.state not in OVER:
            source.cancel(event.reason)
            self._tell(Failed(sequence.serial, event.reason, event.error))

    def _send(self, peer: str, messages: list[handoff.Message]) -> None:
        self.outbox += [(peer, message) for message in messages]

    def _tell(self, message: ToFront) -> None:
        self.outbox.append((FRONT, message))

    # -- what can be seen -----------------------------------------------------------------------------------------

    @property
    def idle(self) -> bool:
        """Nothing runs, waits, flies or moves."""
        return self.scheduler.idle and not self.targets and not self.sources and not self.work

    def load(self) -> Load:
        """The lane's state in numbers."""
        scheduler, pool = self.scheduler, self.scheduler.pool
        states = Counter(
            [t.state.value for t in self.targets.values()] + [s.state.value for s in self.sources.values()]
        )
        quarantined = sum(
            scheduler.reserved.writing(target.handoff)
            for target in self.targets.values()
            if target.state is State.QUARANTINED
        )
        return Load(
            len(scheduler.running),
            len(scheduler.live) - len(scheduler.running),
            len(scheduler.flights),
            scheduler.queued_tokens,
            pool.usable,
            pool.available,
            pool.cached,
            pool.writing,
            quarantined,
            tuple(sorted(states.items())),
            scheduler.preemptions,
            self.steps,
            self.moved_blocks,
            scheduler.prompt_tokens,
            scheduler.cached_tokens,
            scheduler.shape.max_rows,
            scheduler.shape.max_tokens,
            asked_again=self.asked_again,
        )

    def check(self) -> None:
        """Assert that handoffs, reservations and sequences agree. For tests and idle moments."""
        self.scheduler.check()
        assert self._prompts.keys() == self.sources.keys()
        assert all(number in self.targets for number in self._expected)
        reserved = {
            number
            for number, target in self.targets.items()
            if target.state in (State.RESERVED, State.COPYING, State.QUARANTINED)
        }
        pending = {n for n in self._expected if self.targets[n].state in (State.COMMITTED, *OVER)}
        assert reserved <= self.scheduler.reserved.handoffs <= reserved | pending


def _known(submit: Submit) -> int:
    """Tokens that the first choice knows."""
    return len(submit.request.prompt_ids) + len(submit.parts[0].emitted)
