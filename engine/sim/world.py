"""A whole cluster in one thread under a virtual clock: the production front and lanes, a faulty network, one seed.

    clients -> Router, Members  ~~network~~  Member, Agent, Scheduler -> ModelledRunner          (a lane)
                                             Agent ~~network~~ Agent                              (handoffs)

Everything between the tildes is the code that serves; the clock, the network, the devices and the processes are
modelled. A process may die and come back under a new name, be restarted once it has ended what it serves, stop and
go on, lose its links; a message may be lost, doubled, late or damaged. Once the faults are over all must end, and
every block and record be given back.
Cost: about 40 us an event.
"""

import heapq
import itertools
import random
from collections.abc import Callable
from functools import partial
from hashlib import blake2b

from engine.core import handoff, prefix
from engine.core.agent import Agent, Gather
from engine.core.events import Emission
from engine.core.handoff import Parts
from engine.core.journeys import Track
from engine.core.membership import Member, Members
from engine.core.messages import FRONT, Cancel
from engine.core.plan import StepPlan
from engine.core.roles import Role
from engine.core.router import Router
from engine.core.scheduler import LaneShape, Scheduler
from engine.sim.faults import Faults, draw
from engine.sim.runner import ModelledRunner
from engine.sim.traffic import CONTEXT, EOS, VOCAB, Judge, draw_requests

BLOCK = 4
STEP_S = 0.02
TICK_S = 0.1
REPORT_S = 0.3
PATIENCE_S = 25.0  # after the faults are over, everything has ended by then
LAYOUTS: tuple[tuple[Role, ...], ...] = (
    ("prefill", "decode"),
    ("prefill", "prefill", "decode", "decode"),
    ("prefill", "decode", "decode"),
    ("both", "both"),
    ("prefill", "both"),
)


class Process:
    """One lane's process over its lives."""

    def __init__(self, world: "World", slot: str, role: Role, rng: random.Random):
        self.world, self.slot, self.role = world, slot, role
        self.blocks, self.rows = rng.randint(18, 21 if world.tight else 48), rng.randint(2, 5)
        self.tokens = rng.randint(8, 24)
        self.life = 0
        self.alive, self.paused_until = True, 0.0
        self.turn_at = float("inf")
        self.start()

    def start(self) -> None:
        """A new life: nothing is known, nothing is held."""
        self.life += 1
        self.name = f"{self.slot}.{self.life}"
        shape = LaneShape(self.blocks, BLOCK, self.rows, self.tokens, CONTEXT, VOCAB, (EOS,))
        self.agent = Agent(self.name, Scheduler(shape, prefix.root("sim")))
        self.device = ModelledRunner(self.blocks, BLOCK, self.rows, CONTEXT, VOCAB)
        self.member = Member(self.name, self.role, self.world.now)
        self.finish_at: list[float] = []
        self.cancelled: set[int] = set()  # serials
        self.silenced: set[int] = set()  # those a turn later
        self.report_at = self.world.now
        self.poke(self.world.now)

    def poke(self, at: float) -> None:
        """Turn no later than `at`."""
        at = max(at, self.paused_until)
        if at < self.turn_at:
            self.turn_at = at
            self.world.at(at, self._turn_if_due)

    def _turn_if_due(self) -> None:
        if self.alive and self.world.now >= self.turn_at:
            if self.world.now < self.paused_until:
                self.turn_at = float("inf")
                self.poke(self.paused_until)
            else:
                self.turn_at = float("inf")
                self.turn()

    def hear(self, sender: str, payload: object) -> None:
        """A message has arrived."""
        now = self.world.now
        if sender == FRONT:
            for message in self.member.receive(now, payload):  # type: ignore[arg-type]
                self.agent.receive(now, FRONT, message)
                if isinstance(message, Cancel):
                    self.cancelled.update(message.serials)
        else:
            self.agent.receive(now, sender, payload)  # type: ignore[arg-type]
        self.poke(now)

    def turn(self) -> None:
        """What the loop of a lane does, once."""
        now = self.world.now
        self._front(self.member.tick(now))
        if self.member.fenced:
            self.start()
            return
        if self.member.session is not None:
            self._steps(now)
            self._send(now)
        self.poke(min([now + TICK_S, *self.finish_at[:1]]))

    def _steps(self, now: float) -> None:
        agent = self.agent
        while self.finish_at and self.finish_at[0] <= now:
            self.finish_at.pop(0)
            self._collect()
        while len(agent.scheduler.flights) < 2:
            plan = agent.plan(now)
            self._work(now)
            if plan is None:
                break
            if self.world.chance(self.world.faults.launch_fails):
                self.device.fail_launch.add(plan.step)
            if self.world.chance(self.world.faults.step_fails):
                self.device.fail_collect.add(plan.step)
            try:
                self.device.launch(plan)
            except RuntimeError:
                self.device.launch(plan)
            self.finish_at.append(max(now, *self.finish_at, 0.0) + self.step_s(plan))
        if self.world.rng.random() < 0.05:
            agent.check()

    def step_s(self, plan: StepPlan) -> float:
        """How long the device takes for a step."""
        return STEP_S

    def _collect(self) -> None:
        step = self.agent.scheduler.flights[0].plan.step
        try:
            result = self.device.collect()
        except RuntimeError as error:
            self.finish_at.clear()
            self.device.reset()
            self.agent.fail(step, str(error))
        else:
            self.agent.collect(result)

    def _work(self, now: float) -> None:
        work, self.agent.work = self.agent.work, []
        for each in work:
            if isinstance(each, Gather):
                part = each.part._replace(staged=self.device.gather(each.blocks))
                self.world.post(self.name, each.peer, part)
            else:
                self.device.scatter(each.blocks, each.staged)  # type: ignore[arg-type]

    def _send(self, now: float) -> None:
        outbox, self.agent.outbox = self.agent.outbox, []
        for _, message in outbox:
            if isinstance(message, Emission):
                assert self.silenced.isdisjoint(message.serials.tolist()), "a token after the cancel"
        self.silenced |= self.cancelled
        if now >= self.report_at:
            self.report_at = now + REPORT_S
            outbox.append((FRONT, self.agent.load()))
        for peer, message in outbox:
            if peer == FRONT:
                self._front(self.member.send(now, message))  # type: ignore[arg-type]
            else:
                self.world.post(self.name, peer, message)

    def _front(self, packets: list) -> None:
        for packet in packets:
            self.world.post(self.name, FRONT, packet)

    def die(self) -> None:
        """The process is killed; another takes its place after a while."""
        if self.alive:
            self.alive = False
            name, back = self.name, self.world.rng.uniform(0.3, 2.0)
            if self.world.rng.random() < 0.7:  # its connection breaks
                self.world.at(self.world.now + self.world.rng.uniform(0.0, 0.5), lambda: self.world.lost(name))
            self.world.at(self.world.now + back, self.return_)

    def return_(self) -> None:
        """The supervisor has started it again."""
        self.alive, self.turn_at, self.paused_until = True, float("inf"), 0.0
        self.start()

    @property
    def restored(self) -> bool:
        pool = self.agent.scheduler.pool
        return self.agent.idle and pool.available == pool.usable and pool.writing == 0


class World:
    """One life. `run` raises AssertionError, with what went wrong, if anything promised does not hold."""

    def __init__(self, seed: int, requests: int = 16, calm: bool = False):
        self.seed, self.rng, self.now = seed, random.Random(seed), 0.0
        self.faults: Faults = draw(self.rng, calm)
        self.tight = self.rng.random() < 0.4  # pools that hold little more than one request, and many requests
        self.events = 0
        self._digest = blake2b(digest_size=16)
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._count = itertools.count()
        self.router = Router(BLOCK, CONTEXT, (EOS,), prefix.root("sim"), partial(self.rng.randbytes, 16))
        self.members = Members(self.router, 1)
        self.judge = Judge(self.faults.step_fails > 0)
        self._cut: dict[tuple[str, str], float] = {}
        self.processes = [
            Process(self, f"{role[0]}{k}", role, self.rng) for k, role in enumerate(self.rng.choice(LAYOUTS))
        ]
        self._plan_faults()
        for asked in draw_requests(self.rng, self.faults, 2 * requests if self.tight else requests):
            self.at(0.2 + asked.at, lambda asked=asked: self._ask(asked))
        self._front_tick()

    # -- what happens ---------------------------------------------------------------------------------------------

    def at(self, time: float, action: Callable[[], None]) -> None:
        """Do `action` at `time`."""
        heapq.heappush(self._heap, (time, next(self._count), action))

    def chance(self, share: float) -> bool:
        """Whether a fault of this chance happens now."""
        return self.now < self.faults.heal_at and self.rng.random() < share

    def _plan_faults(self) -> None:
        faults = self.faults
        kinds = {self._crash: faults.crashes, self._pause: faults.pauses, self._cut_link: faults.cuts}
        for kind, count in (kinds | {self._flip: faults.flips, self._retire: faults.restarts}).items():
            for _ in range(count):
                self.at(self.rng.uniform(0.1, faults.heal_at), kind)

    def _crash(self) -> None:
        self.rng.choice(self.processes).die()

    def _pause(self) -> None:
        process = self.rng.choice(self.processes)
        pause_s = self.rng.uniform(0.1, 1.0) * self.faults.pause_s
        process.paused_until = max(process.paused_until, self.now + pause_s)

    def _flip(self) -> None:
        self.router.set_role(self.rng.choice(self.processes).name, self.rng.choice(["prefill", "decode", "both"]))

    def _retire(self) -> None:
        process = self.rng.choice(self.processes)
        if (name := process.name) in self.router.lanes:
            self.router.retire(name)
            self._renew(process, name, self.now + self.rng.uniform(0.1, 3.0))

    def _renew(self, process: Process, name: str, until: float) -> None:
        """End a life when it serves nothing, or the time is over."""
        if self.router.serves(name) and self.now < until:
            self.at(self.now + TICK_S, lambda: self._renew(process, name, until))
            return
        if process.name == name:
            process.die()
        self.router.returned(name)

    def _cut_link(self) -> None:
        ends = [FRONT, *(process.slot for process in self.processes)]
        one, other = self.rng.sample(ends, 2)
        self._cut[one, other] = self.now + self.rng.uniform(0.1, 5.0)

    def _ask(self, asked) -> None:
        if not self.router.ready:
            self.at(self.now + 0.5, lambda: self._ask(asked))
            return
        journey = self.router.submit(asked.request, asked.seed, self.now)
        if asked.cancel_at is not None:
            self.at(asked.cancel_at, lambda: self._leave(journey.tracks[asked.leaves]))
        if asked.hold_at is not None:
            self.at(asked.hold_at, lambda: (self.router.hold(journey, True), self._front_says()))
            self.at(asked.hold_at + 1.0, lambda: (self.router.hold(journey, False), self._front_says()))
        self._front_says()

    def _leave(self, tracks: list[Track]) -> None:
        for track in tracks:
            self.router.end(track, "abort")
        self._front_says()

    def lost(self, name: str) -> None:
        """The front notices that a connection broke."""
        self.members.lost(name)
        self._front_says()

    def _front_tick(self) -> None:
        for name, packet in self.members.tick(self.now):
            self.post(FRONT, name, packet)
        self._front_says()
        self.at(self.now + TICK_S, self._front_tick)

    def _front_says(self) -> None:
        for name, packet in self.members.flush(self.now):
            self.post(FRONT, name, packet)
        events, self.router.events = self.router.events, []
        for event in events:
            self.judge.hear(event)

    # -- the network ----------------------------------------------------------------------------------------------

    def post(self, sender: str, receiver: str, payload: object) -> None:
        """Put a message on its way; what becomes of it is up to the faults."""
        link = sender.split(".")[0], receiver.split(".")[0]
        if self._cut.get(link, 0.0) > self.now or self.chance(self.faults.drop):
            return
        if isinstance(payload, Parts) and self.chance(self.faults.damage):
            payload = payload._replace(staged=None)  # the checksum tells
        for _ in range(2 if self.chance(self.faults.double) else 1):
            delay = self.rng.uniform(0.0005, 0.002)
            if self.chance(self.faults.late):
                delay += self.rng.uniform(0.0, self.faults.late_s)
            self.at(self.now + delay, lambda: self._arrive(sender, receiver, payload))

    def _arrive(self, sender: str, receiver: str, payload: object) -> None:
        self._digest.update(f"{self.now:.9f} {sender} {receiver} {type(payload).__name__}\n".encode())
        if receiver == FRONT:
            for name, answer in self.members.receive(self.now, sender, payload):  # type: ignore[arg-type]
                self.post(FRONT, name, answer)
            self._front_says()
            return
        process = next(process for process in self.processes if process.slot == receiver.split(".")[0])
        if not process.alive or (process.name != receiver and not isinstance(payload, handoff.Stop)):
            return
        if self.now < process.paused_until:
            self.at(process.paused_until, lambda: self._arrive(sender, receiver, payload))
            return
        process.hear(sender, payload)

    # -- the end --------------------------------------------------------------------------------------------------

    @property
    def over(self) -> bool:
        """Everything asked for has ended and everything held was given back."""
        return (
            self.now > self.faults.heal_at
            and not self.router.journeys
            and len(self.router.lanes) == len(self.processes)
            and all(process.alive and process.restored for process in self.processes)
        )

    def run(self) -> "World":
        """Live until everything is over; the invariants are checked on the way and at the end."""
        until = self.faults.heal_at + PATIENCE_S
        while self._heap and not (self.events % 16 == 0 and self.over):
            self.now, _, action = heapq.heappop(self._heap)
            assert self.now < until, f"not over {PATIENCE_S:.0f} s after the last fault: {self.state()}"
            action()
            self.events += 1
        self.router.check()
        for process in self.processes:
            process.agent.check()
        assert not self.router._legs and not self.router._tracks, "the router remembers what is over"
        return self

    def state(self) -> str:
        """What is not over, in words."""
        open_ = [journey.request.request_id for journey in self.router.journeys]
        busy = {p.name: (p.alive, p.agent.load()) for p in self.processes if not p.alive or not p.restored}
        return f"open requests {open_}, lanes {sorted(self.router.lanes)}, busy {busy}"

    @property
    def digest(self) -> str:
        """Of every arrival, in order: equal for equal seeds."""
        return self._digest.hexdigest()
