"""Restarts lanes one after another under load: each ends what it serves; what is left then goes on elsewhere.

    ready --retire--> draining --serves nothing | drain_s is over--> its processes end and start --> ready again
      `-- it, or another of its role, is not: NotReady         ended again, given up: NotReady, no more restarts

Lanes of which there are others of the role come first, so that the last ones meet a cluster that is new already.
The thread is the caller's; it asks the replica and whoever keeps the processes ten times a second.
"""

import threading
import time
from collections.abc import Mapping, Sequence

from engine.cluster.supervisor import Worker
from engine.errors import InvalidArgument, NotReady, Unavailable, wrong
from engine.lanes import LaneSpec
from engine.replica.loads import DRAINING, GIVEN_UP, READY, STARTING, ProcessNow, Standing
from engine.replica.replica import Replica
from engine.replica.restarts import Tell

LOOK_S = 0.1
STARTING_S = 1800.0  # a lane that has not come back by then is not waited for


class Rolling:
    """Over the lanes of a cluster, the keepers of their processes and the replica that they serve."""

    def __init__(self, lanes: Sequence[LaneSpec], workers: Mapping[str, Worker], replica: Replica):
        self._lanes, self._workers, self._replica = lanes, workers, replica
        self._busy = threading.Lock()

    def restart(self, names: Sequence[str], drain_s: float, tell: Tell, leave: threading.Event) -> None:
        """Restart lanes, all where none is named; blocks. `leave` ends it after the lane that it is at.

        Raises InvalidArgument, NotReady, and Unavailable where the replica ends meanwhile.
        """
        lanes = order(self._lanes, names)
        if not self._busy.acquire(blocking=False):
            raise NotReady("restart: another one is under way; expected one at a time")
        try:
            for lane in lanes:
                if not leave.is_set():
                    self._renew(lane, drain_s, tell)
        finally:
            self._busy.release()

    def _renew(self, lane: LaneSpec, drain_s: float, tell: Tell) -> None:
        worker, name = self._workers[lane.name], self._ready(lane)
        began = time.monotonic()
        self._replica.retire(name)
        try:
            left = self._drain(worker, name, drain_s, tell)
            drained_s = time.monotonic() - began
            rest = f"; {left} still under way" if left else ""
            tell(lane.name, STARTING, f"drained for {drained_s:.1f} s{rest}")
            self._start(worker, name, tell)
        finally:
            self._replica.returned(name)
        tell(lane.name, READY, f"after {time.monotonic() - began:.1f} s")

    def _ready(self, lane: LaneSpec) -> str:
        """The present name of a lane, of whose role all are there. Raises NotReady."""
        names = {each.name: self._name(each.name) for each in self._lanes if each.role == lane.role}
        for other in (each for each in self._lanes if each.name in names):
            if names[other.name] is None:
                why = "" if other is lane else f", and {lane.name} of the same role serves for it"
                raise NotReady(f"lane {other.name}: it is not ready{why}; serac status says what it does")
        return names[lane.name] or ""

    def _drain(self, worker: Worker, name: str, drain_s: float, tell: Tell) -> int:
        """Wait until it serves nothing, or the time is over; what it still serves."""
        until, said = time.monotonic() + drain_s, -1
        while (serves := self._replica.serves(name)) and time.monotonic() < until:
            if serves != said:
                tell(worker.slot, DRAINING, f"{serves} under way")
                said = serves
            self._pause(worker)
        return serves

    def _start(self, worker: Worker, before: str, tell: Tell) -> None:
        """End its processes and wait until the lane has joined with new ones. Raises NotReady."""
        lives, said, until = worker.lives, "", time.monotonic() + STARTING_S
        worker.renew()
        while worker.lives == lives or self._name(worker.slot) in (None, before):
            if worker.lives > lives + 1 or worker.given_up or time.monotonic() > until:
                why = f" ({worker.problem})" if worker.problem else ""
                raise NotReady(f"lane {worker.slot}: it does not come back{why}; no other is restarted")
            if worker.lives > lives and (stage := stage_of(worker)) != said:
                tell(worker.slot, STARTING, stage)
                said = stage
            self._pause(worker)

    def _name(self, slot: str) -> str | None:
        """That of a lane's present life, None while it has none."""
        names = list(self._replica.router.lanes)
        return next((name for name in names if name.split(".")[0] == slot), None)

    def _pause(self, worker: Worker) -> None:
        if worker.stopping and not worker.given_up:
            raise Unavailable("restart: the server ends")
        time.sleep(LOOK_S)


def order(lanes: Sequence[LaneSpec], names: Sequence[str]) -> list[LaneSpec]:
    """The lanes of these names, all where there is none: those with others of the role first. InvalidArgument."""
    known = {lane.name for lane in lanes}
    for name in names:
        if name not in known:
            raise InvalidArgument(wrong("lanes", name, "some of " + ", ".join(sorted(known))), field="lanes")
    roles = [lane.role for lane in lanes]
    chosen = [lane for lane in lanes if not names or lane.name in names]
    return sorted(chosen, key=lambda lane: roles.count(lane.role) == 1)


def stage_of(worker: Worker) -> str:
    """What the slowest of its processes does."""
    slow = [each for each in standing(worker, ()).processes if each.state != "ready"]
    if not slow:
        return "joining"
    each = min(slow, key=lambda each: (each.state != "awaited", each.done / max(each.of, 1)))
    return f"rank {each.rank}: {each.stage or each.state}"


def standing(worker: Worker, hosts: Sequence[str]) -> Standing:
    """A lane's processes as their keeper sees them. hosts: their names by rank, for a person."""
    group, found = worker.group, []
    for rank in range(len(hosts) or len(worker.processes)):
        state = GIVEN_UP if worker.given_up else "awaited" if group is None else group.state(rank)
        stage = group.stages.get(rank, ("", 0, 0)) if group is not None and state == STARTING else ("", 0, 0)
        found.append(ProcessNow(rank, hosts[rank] if hosts else "", state, *stage))
    since_s = time.monotonic() - worker.began_at if worker.lives else 0.0
    return Standing(tuple(found), max(worker.lives - 1, 0), since_s, worker.problem)
