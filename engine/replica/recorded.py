"""A device whose plans and results are logged; whatever it does, a lane sees the device alone.

    Lane --launch, collect, reset--> Recorded --the same--> device
                                        `--> PlanWriter

A plan is logged before its launch, so that the last one of a process that dies is there, a result when it came.
Cost: that of engine/observe/plan_writer.py on the lane's thread.
"""

from collections import deque
from collections.abc import Sequence

from engine.core.plan import StepPlan, StepResult
from engine.observe.plan_writer import PlanWriter
from engine.replica.lane import Device


class Recorded:
    """Fits `Device`; `device` is the one that runs, `log` its log."""

    def __init__(self, device: Device, log: PlanWriter):
        self.device, self.log = device, log
        self._flights: deque[int] = deque()

    def launch(self, plan: StepPlan) -> None:
        """Log `plan`, then launch it."""
        self.log.plan(plan)
        try:
            self.device.launch(plan)
        except Exception as error:
            self.log.failure(plan.step, "launch", error)
            raise
        self._flights.append(plan.step)

    def collect(self) -> StepResult:
        """Collect, then log what came."""
        step = self._flights.popleft()
        try:
            result = self.device.collect()
        except Exception as error:
            self.log.failure(step, "collect", error)
            raise
        self.log.result(result)
        return result

    def reset(self) -> None:
        """Log that the device is made anew, and do it."""
        self._flights.clear()
        self.log.reset()
        self.device.reset()

    def gather(self, blocks: Sequence[int]):
        """Read blocks; nothing changes, nothing is logged."""
        return self.device.gather(blocks)  # type: ignore[attr-defined]  # of lanes that move blocks

    def scatter(self, blocks: Sequence[int], staged) -> None:
        """Log which blocks are written from outside; their content is not logged."""
        self.log.moved(blocks)
        self.device.scatter(blocks, staged)  # type: ignore[attr-defined]
