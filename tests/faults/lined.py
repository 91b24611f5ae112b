"""A lane's process as a front starts it, with everything but the model: its lines, and a hash for a device.

`python -m tests.faults.lined SLOT ROLE FOLDER` says hello, waits for its group's start and the front's address, and
serves; where FOLDER has a file SLOT.broken it ends at once, with those words.
"""

import secrets
import signal
import sys
from pathlib import Path

from prometheus_client import CollectorRegistry

from engine import embedded
from engine.clock import SystemClock
from engine.core import prefix
from engine.core.agent import Agent
from engine.core.scheduler import LaneShape, Scheduler
from engine.observe.metrics import Metrics
from engine.replica.joined import Joined
from engine.replica.lane import Lane
from engine.replica.moves import Bytes, Reach
from engine.starter import Pipes, Starter
from tests.faults.worker import BLOCK, BLOCKS, CONTEXT, EOS, GEOMETRY, ROWS, VOCAB, SlowRunner, arrive, leave

ROOT = prefix.root("hash")
FACTS = {
    "name": "hash",
    "revision": "r1",
    "root": ROOT.hex(),
    "folder": str(embedded.folder()),
    "context": CONTEXT,
    "vocab": VOCAB,
    "eos_ids": [EOS],
    "block_size": BLOCK,
    "block_bytes": 8 * BLOCK,
    "num_blocks": BLOCKS,
    "describe": {"num_blocks": BLOCKS, "compile_seconds": 0.0, "lane_axes": {}},
}


def main() -> None:
    """The command line."""
    slot, role, folder = sys.argv[1:]
    if (broken := Path(folder, f"{slot}.broken")).exists():
        sys.exit(broken.read_text())
    starter = Starter(Pipes(sys.stdin, sys.stdout))
    starter.say(event="hello", alike={})
    starter.wait("start")
    starter.show("load", 1, 2)
    clock, metrics = SystemClock(), Metrics(CollectorRegistry())
    device = SlowRunner(BLOCKS, BLOCK, ROWS, CONTEXT, VOCAB)
    shape = LaneShape(BLOCKS, BLOCK, ROWS, 64, CONTEXT, VOCAB, (EOS,))

    def make_lane(name, courier):
        device.reset()
        return Lane(Agent(name, Scheduler(shape, ROOT)), device, clock, metrics, courier)

    starter.say(event="ready", rank=0, **FACTS)
    words = starter.wait("front")
    reach = Reach(words["front"], [words["listen"]], bytes.fromhex(words["secret"]), GEOMETRY)
    joined = Joined(role, make_lane, lambda: f"{slot}.{secrets.token_hex(4)}", reach, Bytes(leave, arrive), clock)
    signal.signal(signal.SIGTERM, lambda *_: joined.stop())
    joined.run(lambda name: starter.say(event="life", name=name))


if __name__ == "__main__":
    main()
