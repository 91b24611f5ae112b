"""The main loop of a lane: what it heard, plan, work, launch, collect, what it says.

    turn:  inbox -> plan N+1 while step N runs -> gather, scatter -> launch | collect N -> outbox, once a turn

Two steps are in flight at most: one runs, one waits behind it on the device. A step that raises before launch is
launched once more as it is; one that raises on the device costs the pool, and every sequence is computed again
(engine/core/scheduler.py, `fail`). The clock, the device and the ways out are arguments; tests turn the loop.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

from engine.clock import Clock
from engine.core import handoff
from engine.core.agent import Agent, Gather
from engine.core.handoff import Parts
from engine.core.messages import FRONT, ToFront, ToLane
from engine.core.plan import StepPlan, StepResult
from engine.observe.metrics import Metrics

IN_FLIGHT = 2
IDLE_WAIT_S = 0.05  # how late a deadline may be noticed while nothing runs
REPORT_S = 0.25  # between two reports of its load

logger = logging.getLogger("serac.lane")

Said = tuple[str, ToFront | handoff.Message]  # (to whom, what)


class Device(Protocol):
    """What a lane asks of a runner; the real one and the modelled one fit."""

    def launch(self, plan: StepPlan) -> None: ...
    def collect(self) -> StepResult: ...
    def reset(self) -> None: ...
    def gather(self, blocks: Sequence[int]) -> object: ...
    def scatter(self, blocks: Sequence[int], staged: object) -> None: ...


class Courier(Protocol):
    """Brings blocks that a device gathered to another lane, which hears of them as a message."""

    def send(self, sender: str, receiver: str, part: Parts) -> None: ...


class Lane:
    """One agent, one device, one thread. `connect` says where what it says goes."""

    def __init__(
        self,
        agent: Agent,
        device: Device,
        clock: Clock,
        metrics: Metrics,
        courier: Courier | None = None,
        late_compiles: Callable[[], int] = lambda: 0,
    ):
        self.agent, self._device, self._late_compiles = agent, device, late_compiles
        self._clock, self._metrics, self._courier = clock, metrics, courier
        self._post: Callable[[str, list[Said]], None] = lambda name, said: None
        self._inbox: deque[tuple[str, ToLane | handoff.Message]] = deque()
        self._wake = threading.Event()
        self._stopping = False
        self._launched_at: deque[float] = deque()
        self._report_at = self.turned_at = clock.now()
        self._checked = False

    @property
    def name(self) -> str:
        return self.agent.name

    def connect(self, post: Callable[[str, list[Said]], None]) -> None:
        """From now on what the lane says in a turn goes to `post(its name, messages)`."""
        self._post = post

    def hear(self, sender: str, message: ToLane | handoff.Message) -> None:
        """Take `message` in before the next plan. Any thread may call it."""
        self._inbox.append((sender, message))
        self._wake.set()

    def run(self) -> None:
        """Turn until `stop`; the thread's main function."""
        while not self._stopping:
            if not self.turn():
                self._wake.wait(IDLE_WAIT_S)
                self._wake.clear()

    def stop(self) -> None:
        """Let `run` return after the turn it is in."""
        self._stopping = True
        self._wake.set()

    def turn(self) -> bool:
        """One turn; False when nothing was to do."""
        agent, now = self.agent, self._clock.now()
        self.turned_at = now
        while self._inbox:
            sender, message = self._inbox.popleft()
            agent.receive(now, sender, message)
        plan = agent.plan(now) if len(agent.scheduler.flights) < IN_FLIGHT else None
        worked = self._work()
        busy = plan is not None or bool(agent.scheduler.flights)
        if plan is not None:
            if worked:
                self._launch(plan)
        elif agent.scheduler.flights:
            self._collect()
        self._say(now)
        busy |= bool(self._inbox)
        if not busy and not self._checked:
            agent.check()
        self._checked = not busy
        return busy

    def _work(self) -> bool:
        """What handoffs ask of the device, in the order it was listed; False when it failed."""
        work, self.agent.work = self.agent.work, []
        try:
            for each in work:
                if not isinstance(each, Gather):
                    self._device.scatter(each.blocks, each.staged)
                elif self._courier is not None:
                    staged = self._device.gather(each.blocks)
                    self._courier.send(self.name, each.peer, each.part._replace(staged=staged))
        except Exception as error:
            self._fail(None, error)
            return False
        return True

    def _launch(self, plan: StepPlan) -> None:
        self._launched_at.append(self._clock.now())
        try:
            self._device.launch(plan)
        except Exception as error:
            logger.warning("step %d of lane %s raised before launch: %s; made again", plan.step, self.name, error)
            try:
                self._device.launch(plan)
            except Exception as again:
                self._fail(plan.step, again)

    def _collect(self) -> None:
        step = self.agent.scheduler.flights[0].plan.step
        try:
            result = self._device.collect()
        except Exception as error:
            self._fail(step, error)
        else:
            self._metrics.observe("step_seconds", self._clock.now() - self._launched_at.popleft())
            self.agent.collect(result)

    def _fail(self, step: int | None, error: Exception) -> None:
        what = "a move of blocks" if step is None else f"step {step}"
        logger.error("%s on lane %s failed: %s; its sequences are computed again", what, self.name, error)
        self._launched_at.clear()
        self._device.reset()
        self.agent.fail(step, f"device: a step of this sequence alone failed twice ({type(error).__name__})")

    def _say(self, now: float) -> None:
        said, self.agent.outbox = self.agent.outbox, []
        if now >= self._report_at:
            self._report_at = now + REPORT_S
            said.append((FRONT, self.agent.load()._replace(late_compiles=self._late_compiles())))
        if said:
            self._post(self.name, said)
