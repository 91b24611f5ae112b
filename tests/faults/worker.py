"""A lane in a real process, with everything that serves but the model: its device is a hash (engine/sim/runner.py).

`python -m tests.faults.worker SLOT ROLE FRONT SECRET_HEX [ADDRESS CERTS]` serves until it is killed; ADDRESS is
where other lanes reach it, in TLS by the folder CERTS. A step takes STEP_S.
"""

import secrets
import signal
import sys
import time
from pathlib import Path

import numpy as np
from prometheus_client import CollectorRegistry

from engine.clock import SystemClock
from engine.core import prefix
from engine.core.agent import Agent
from engine.core.scheduler import LaneShape, Scheduler
from engine.movers.geometry import Geometry
from engine.movers.parts import Heads
from engine.movers.tls import Tls
from engine.observe.metrics import Metrics
from engine.replica.joined import Joined
from engine.replica.lane import Lane
from engine.replica.moves import Bytes, Reach
from engine.sim.runner import ModelledRunner

VOCAB, EOS, CONTEXT, BLOCK, BLOCKS, ROWS = 997, 996, 256, 4, 400, 8
STEP_S = 0.005
GEOMETRY = Geometry(1, 1, 1, "int64", BLOCK, "hash", "invariant")


class SlowRunner(ModelledRunner):
    """Takes as long as a device would."""

    def collect(self):
        time.sleep(STEP_S)
        return super().collect()


def leave(staged: np.ndarray, count: int):
    """[n, C] as keys [K, L, n, C, H], and values that say nothing."""
    keys = np.ascontiguousarray(staged[:count])[None, None, :, :, None]
    return (Heads(keys, np.zeros_like(keys)),)


def arrive(staged) -> np.ndarray:
    keys, values, _ = staged
    assert not values.any()
    return np.array(keys[0, 0, :, :, 0])


def main() -> None:
    """The command line."""
    slot, role, front, secret, *beyond = sys.argv[1:]
    address, tls = (beyond[0], Tls(Path(beyond[1]))) if beyond else ("127.0.0.1", None)
    clock, metrics = SystemClock(), Metrics(CollectorRegistry())
    device = SlowRunner(BLOCKS, BLOCK, ROWS, CONTEXT, VOCAB)
    shape = LaneShape(BLOCKS, BLOCK, ROWS, 64, CONTEXT, VOCAB, (EOS,))

    def make_lane(name, courier):
        device.reset()
        return Lane(Agent(name, Scheduler(shape, prefix.root("hash"))), device, clock, metrics, courier)

    reach = Reach(front, [f"{address}:0"], bytes.fromhex(secret), GEOMETRY, tls)
    names = lambda: f"{slot}.{secrets.token_hex(4)}"  # noqa: E731
    joined = Joined(role, make_lane, names, reach, Bytes(leave, arrive), clock)
    signal.signal(signal.SIGTERM, lambda *_: joined.stop())
    joined.run(lambda name: print(name, flush=True))


if __name__ == "__main__":
    main()
