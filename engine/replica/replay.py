"""Runs a plan log again on a device and compares every result with the one that was logged.

    PLAN -> launch | RESULT -> collect, compare | RESET -> reset | FAILURE of a launch: that plan is not launched

Plans and results come in the order of the log, so that as many steps are in flight as were. A plan whose launch had
raised changed nothing and is left out; behind a step that failed on the device stands a reset. Steps that were in
flight when the log ends are run and not compared: the last of them may be why it ends. Where blocks came from
another lane the replay ends too, because their content is not in the log.
Cost: that of the steps, and 50 us each to read and compare.
"""

from collections import deque
from dataclasses import dataclass

import numpy as np

from engine.clock import Clock
from engine.core.plan import StepPlan, StepResult
from engine.errors import Malformed
from engine.observe.plan_bytes import check_plan
from engine.observe.plan_log import Failure, Moved, PlanLog, Record, Reset
from engine.replica.lane import Device

BITS = ("tokens", "finite", "rank", "top_ids")
FLOATS = ("logprob", "top_logprobs")


@dataclass(frozen=True, slots=True)
class Difference:
    """The first point that came out otherwise; `what` is a field of StepResult, or an entry such as top_ids[3]."""

    step: int
    point: int
    what: str
    wanted: float
    got: float


@dataclass(slots=True)
class Outcome:
    """What a replay did and found."""

    steps: int = 0
    rows: int = 0
    points: int = 0  # compared
    different: int = 0  # of these
    first: Difference | None = None
    resets: int = 0
    failures: int = 0  # steps that had failed, and were not compared
    unanswered: int = 0  # steps in flight at the end of the log
    moved: int = 0  # blocks that came from another lane, where the replay ended
    seconds: float = 0.0

    @property
    def equal(self) -> bool:
        """Every result that the log holds came out again."""
        return self.different == 0 and self.moved == 0


def differing(wanted: StepResult, got: StepResult, tolerance: float) -> tuple[np.ndarray, Difference | None]:
    """bool [points], True where the two are unlike, and the first of these.

    tolerance  of log-probabilities. 0 compares everything; above it ranks and the tokens listed as most probable
               are left out, which near ties exchange.
    """
    unlike, first = np.zeros(len(wanted.tokens), bool), None
    for name in ("tokens", "finite", *FLOATS) if tolerance else (*BITS, *FLOATS):
        left, right = getattr(wanted, name), getattr(got, name)
        if left is None:
            continue
        right = np.asarray(right, left.dtype)
        entries = ~_alike(left, right, tolerance if name in FLOATS else 0.0)
        other = entries.any(axis=1) if entries.ndim > 1 else entries
        unlike |= other
        if other.any() and (first is None or int(other.argmax()) < first.point):
            place = np.unravel_index(entries.argmax(), entries.shape)
            what = name if entries.ndim == 1 else f"{name}[{place[1]}]"
            first = Difference(wanted.step, int(place[0]), what, left[place].item(), right[place].item())
    return unlike, first


def _alike(left: np.ndarray, right: np.ndarray, tolerance: float) -> np.ndarray:
    if left.dtype.kind != "f":
        return left == right
    with np.errstate(invalid="ignore"):
        return (left == right) | (np.abs(left - right) <= tolerance) | (np.isnan(left) & np.isnan(right))


class Replay:
    """One log on one device. `outcome` is what was found so far, also after an error."""

    def __init__(self, log: PlanLog, device: Device, tolerance: float, clock: Clock):
        self.outcome = Outcome()
        self._log, self._device, self._tolerance, self._clock = log, device, tolerance, clock
        self._flights: deque[StepPlan] = deque()
        self._planned: StepPlan | None = None  # read, and not launched before it is known that it had been
        self._failed = False  # on the device; a reset follows

    def run(self) -> Outcome:
        """Replay it all. Raises Malformed for a damaged log, and what the device raises."""
        began = self._clock.now()
        try:
            for number, record in enumerate(self._log.records(), 1):
                try:
                    self._take(record)
                except Malformed as error:
                    raise Malformed(f"{self._log.path}: record {number}: {error}") from None
                if self.outcome.moved:
                    break
            self._finish()
        finally:
            self.outcome.seconds = self._clock.now() - began
        return self.outcome

    def _take(self, record: Record) -> None:
        if isinstance(record, Failure):
            self._fail(record)
            return
        self._launch()
        if isinstance(record, Reset):
            self._device.reset()
            self._flights.clear()
            self._failed = False
            self.outcome.resets += 1
        elif self._failed:
            raise Malformed("got a step on a device that had failed; expected a reset")
        elif isinstance(record, StepPlan):
            check_plan(record, self._log.header.bounds)
            self._planned = record
        elif isinstance(record, StepResult):
            self._collect(record)
        elif isinstance(record, Moved):
            self.outcome.moved += len(record.blocks)

    def _launch(self) -> None:
        """Launch the plan that was read last, if one was."""
        if self._planned is not None:
            plan, self._planned = self._planned, None
            self._device.launch(plan)
            self._flights.append(plan)
            self.outcome.steps += 1
            self.outcome.rows += len(plan.rows)

    def _fail(self, failure: Failure) -> None:
        if failure.at == "launch" and self._planned is not None and self._planned.step == failure.step:
            self._planned = None
        else:
            self._launch()
            self._failed = True
        self.outcome.failures += 1

    def _collect(self, wanted: StepResult) -> None:
        plan = self._flights[0] if self._flights else None
        if plan is None or (plan.step, plan.num_points) != (wanted.step, len(wanted.tokens)):
            raise Malformed(f"got a result of step {wanted.step} that no plan in flight has")
        if plan.plain != (wanted.logprob is None):
            raise Malformed(f"got a result of step {wanted.step} of the other kind than its plan")
        self._flights.popleft()
        unlike, first = differing(wanted, self._device.collect(), self._tolerance)
        self.outcome.points += len(unlike)
        self.outcome.different += int(unlike.sum())
        self.outcome.first = self.outcome.first or first

    def _finish(self) -> None:
        self._launch()
        if not self._failed:
            self.outcome.unanswered = len(self._flights)
            for _ in self._flights:
                self._device.collect()
