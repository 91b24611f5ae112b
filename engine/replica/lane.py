"""The main loop of a lane: commands in, plan, launch, collect, events out.

    turn:  commands -> plan N+1 while step N runs -> launch | collect N -> events to the sink, once a turn

Two steps are in flight at most: one runs, one waits behind it on the device. A step that raises before launch is
launched once more as it is; one that raises on the device costs the pool, and every sequence is computed again
(engine/core/scheduler.py, `fail`). The clock and the runner are arguments; tests turn the loop by hand.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import Protocol

from engine.clock import Clock
from engine.core.plan import StepPlan, StepResult
from engine.core.scheduler import Scheduler
from engine.observe.metrics import Metrics

IN_FLIGHT = 2
IDLE_WAIT_S = 0.05  # how late a deadline may be noticed while nothing runs

logger = logging.getLogger("serac.lane")

Command = Callable[[Scheduler], None]
Sink = Callable[[list], None]


class Device(Protocol):
    """What a lane asks of a runner; the real one and the modelled one fit."""

    def launch(self, plan: StepPlan) -> None: ...
    def collect(self) -> StepResult: ...
    def reset(self) -> None: ...


class Lane:
    """One scheduler, one device, one thread."""

    def __init__(self, name: str, scheduler: Scheduler, device: Device, clock: Clock, metrics: Metrics, sink: Sink):
        self.name, self.scheduler, self._device = name, scheduler, device
        self._clock, self._metrics, self._sink = clock, metrics, sink
        self._commands: deque[Command] = deque()
        self._wake = threading.Event()
        self._stopping = False
        self._launched_at: deque[float] = deque()
        self._checked = False
        self.steps = 0

    def post(self, command: Command) -> None:
        """Run `command` on the lane's thread before its next plan. Any thread may call it."""
        self._commands.append(command)
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
        scheduler = self.scheduler
        while self._commands:
            self._commands.popleft()(scheduler)
        plan = scheduler.plan(self._clock.now()) if len(scheduler.flights) < IN_FLIGHT else None
        busy = plan is not None or bool(scheduler.flights)
        if plan is not None:
            self._launch(plan)
        elif scheduler.flights:
            self._collect()
        self._flush()
        busy |= bool(self._commands)
        if not busy and not self._checked:
            scheduler.check()
        self._checked = not busy
        return busy

    def _launch(self, plan: StepPlan) -> None:
        self._launched_at.append(self._clock.now())
        self.steps += 1
        try:
            self._device.launch(plan)
        except Exception as error:
            logger.warning("step %d of lane %s raised before launch: %s; made again", plan.step, self.name, error)
            try:
                self._device.launch(plan)
            except Exception as again:
                self._fail(plan.step, again)

    def _collect(self) -> None:
        step = self.scheduler.flights[0].plan.step
        try:
            result = self._device.collect()
        except Exception as error:
            self._fail(step, error)
        else:
            self._metrics.observe("step_seconds", self._clock.now() - self._launched_at.popleft())
            self.scheduler.collect(result)

    def _fail(self, step: int, error: Exception) -> None:
        logger.error("step %d of lane %s failed: %s; its sequences are computed again", step, self.name, error)
        self._launched_at.clear()
        self._device.reset()
        self.scheduler.fail(step, f"device: a step of this sequence alone failed twice ({type(error).__name__})")

    def _flush(self) -> None:
        if self.scheduler.events:
            events, self.scheduler.events = self.scheduler.events, []
            self._sink(events)
