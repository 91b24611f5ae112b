"""ControlService: what the server is, how busy it is, and its drain."""

import math
from collections.abc import Awaitable, Callable, Mapping

from engine.clock import Clock
from engine.errors import InvalidArgument, wrong
from engine.serve.contract import Replica
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
    ):
        self._replica, self._gate, self._clock, self._drain = replica, gate, clock, drain
        self._version, self._facts = version, facts
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
        lanes = [
            pb.LaneLoad(name=lane.name, role=lane.role, state=lane.state, gauges=_numbers(lane.gauges))
            for lane in self._replica.lane_loads()
        ]
        gauges = _numbers(self._replica.load())
        return pb.GetLoadResponse(open_requests=self._gate.open_calls, gauges=gauges, lanes=lanes)

    async def drain(self, message: pb.DrainRequest, context: Call) -> pb.DrainResponse:
        """Drain now; the answer comes when nothing runs any more."""
        timeout_s = message.timeout_s if message.HasField("timeout_s") else None
        if timeout_s is not None and not (math.isfinite(timeout_s) and timeout_s >= 0):
            raise InvalidArgument(wrong("timeout_s", timeout_s, "a finite number >= 0"), field="timeout_s")
        unfinished = await self._drain(timeout_s)
        return pb.DrainResponse(drained=unfinished == 0, unfinished=unfinished)


def _numbers(named: Mapping[str, object]) -> dict[str, float]:
    """Those that are numbers."""
    return {
        name: float(value)
        for name, value in named.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }
