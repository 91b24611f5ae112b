"""ControlService: what the server is, how busy it is, its drain, and the restart of its lanes.

Restart -> a thread that restarts --each step--> a message --the end, or its error--> the end of the call
"""

import asyncio
import functools
import math
import threading
from collections.abc import Awaitable, Callable, Mapping

from engine.clock import Clock
from engine.errors import InvalidArgument, wrong
from engine.serve.contract import LaneLoad, Replica
from engine.serve.edge import Call
from engine.serve.gate import Gate
from engine.serve.proto.serac.v1 import control_pb2 as pb


class ControlService:
    """The operator's RPCs. `drain(seconds or None)` returns how many calls were cut off."""

    def __init__(
        self,
        replica: Replica,
        gate: Gate,
        clock: Clock,
        drain: Callable[[float | None], Awaitable[int]],
        version: str,
        facts: Mapping[str, str],
        drain_s: float = 30.0,
    ):
        self._replica, self._gate, self._clock, self._drain = replica, gate, clock, drain
        self._version, self._facts, self._drain_s = version, facts, drain_s
        self._started_at = clock.now()

    async def get_server_info(self, message: pb.GetServerInfoRequest, context: Call) -> pb.GetServerInfoResponse:
        """Facts that do not change, and whether it accepts requests."""
        info = self._replica.info
        return pb.GetServerInfoResponse(
            version=self._version,
            model=info.name,
            revision=info.revision,
            context_length=info.context,
            vocab_size=info.vocab,
            ready=self._gate.ready,
            draining=self._gate.draining,
            uptime_s=self._clock.now() - self._started_at,
            facts=dict(self._facts),
        )

    async def get_load(self, message: pb.GetLoadRequest, context: Call) -> pb.GetLoadResponse:
        """The gauges of the replica and of each lane; what is no number is left out."""
        lanes = [_lane(lane) for lane in self._replica.lane_loads()]
        gauges = _numbers(self._replica.load())
        return pb.GetLoadResponse(open_requests=self._gate.open_calls, gauges=gauges, lanes=lanes)

    async def drain(self, message: pb.DrainRequest, context: Call) -> pb.DrainResponse:
        """Drain now; the answer comes when nothing runs any more."""
        timeout_s = message.timeout_s if message.HasField("timeout_s") else None
        unfinished = await self._drain(None if timeout_s is None else _seconds("timeout_s", timeout_s))
        return pb.DrainResponse(drained=unfinished == 0, unfinished=unfinished)

    async def restart(self, message: pb.RestartRequest, context: Call) -> None:
        """Restart lanes; who hangs up ends it after the lane that it is at."""
        drain_s = _seconds("drain_s", message.drain_s if message.HasField("drain_s") else self._drain_s)
        loop, leave = asyncio.get_running_loop(), threading.Event()
        steps: asyncio.Queue[pb.RestartResponse | None] = asyncio.Queue()

        def tell(lane: str, state: str, words: str) -> None:
            step = pb.RestartResponse(lane=lane, state=state, message=words)
            loop.call_soon_threadsafe(steps.put_nowait, step)

        restart = functools.partial(self._replica.restart, list(message.lanes), drain_s, tell, leave)
        work = asyncio.ensure_future(asyncio.to_thread(restart))
        work.add_done_callback(lambda _: steps.put_nowait(None))
        try:
            while (step := await steps.get()) is not None:
                await context.write(step)
            await work
        finally:
            leave.set()


def _seconds(field: str, value: float) -> float:
    if not (math.isfinite(value) and value >= 0):
        raise InvalidArgument(wrong(field, value, "a finite number >= 0"), field=field)
    return value


def _lane(lane: LaneLoad) -> pb.LaneLoad:
    """One lane with its processes."""
    standing = lane.standing
    return pb.LaneLoad(
        name=lane.name,
        role=lane.role,
        state=lane.state,
        gauges=_numbers(lane.gauges),
        processes=[
            pb.LaneProcess(rank=p.rank, host=p.host, state=p.state, stage=p.stage, done=p.done, of=p.of)
            for p in standing.processes
        ],
        restarts=standing.restarts,
        since_s=standing.since_s,
        problem=standing.problem,
    )


def _numbers(named: Mapping[str, object]) -> dict[str, float]:
    """Those that are numbers."""
    return {
        name: float(value)
        for name, value in named.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }
