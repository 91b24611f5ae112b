"""What a lane over several processes pays for each step beside the step: its orders, and what it tells the front.

    leader: plan --encode, send to 1, 3, 7 followers over loopback TCP--> launch          leader us, on its thread
    follower: read, decode, check --> launch                                              late us, after the leader
    lane: tokens of all rows --post--> front                     said us, on its thread; heard us, until it is there

Every follower and the front are processes of their own. Figures are medians over turns; each turn has every number
of rows and followers once, and a decode step of the embedded model on this CPU beside them. The second step is
planned: what a device of an H200 lane of 8 reads of an 8B model's weights once, at its data sheet's bandwidth, so
that a real step is longer and the share smaller; it is paid while the step before it runs, as all planning is. On a
machine with fewer cores than processes `leader us` and `late us` are mostly the wait for a core.
"""

import queue
import socket
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import median

import numpy as np

from bench.decode import QWEN3_06B, make
from bench.lockstep_child import FRONT, LANE, SECRET
from bench.record import parser, record, show
from engine.core.events import Emission
from engine.core.plan import BLOCK, COUNT, DRAW, ROW, START, StepPlan
from engine.core.session import Packet
from engine.models.config import from_hf
from engine.movers.links import Links
from engine.planning import DEVICES, weights_bytes
from engine.replica.channel import Channel
from engine.replica.followers import Followers
from engine.replica.orders import Have
from engine.weights.drawn import random_weights
from engine.weights.source import resolve
from sharding.mesh import MeshSpec, lane_meshes

FOLLOWERS, ROWS = (1, 3, 7), (1, 64, 256)
REPEATS = 20  # steps a turn
POSITIONS = 100  # that each row of a decode step sees
WAIT_S = 20.0
EIGHT_B = QWEN3_06B | {
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "tie_word_embeddings": False,
}
Samples = dict[tuple[str, int, int], list[float]]  # by what, rows, followers


def plan_of(rows: int, step: int) -> StepPlan:
    """A decode step of so many rows, of which every sixteenth has a new block."""
    lines = np.zeros((rows, 6), np.int32)
    lines[:, ROW] = np.arange(rows)
    lines[:, START] = POSITIONS + step % 1000
    lines[:, COUNT] = lines[:, DRAW] = 1
    lines[::16, BLOCK] = 1 + np.arange(len(lines[::16]))
    return StepPlan(step, lines, (), rows, rows, True, True)


@contextmanager
def started(count: int) -> Iterator[list[Channel]]:
    """Channels to so many follower processes."""
    with socket.create_server(("127.0.0.1", 0)) as door:
        address = "{}:{}".format(*door.getsockname())
        command = [sys.executable, "-m", "bench.lockstep_child", address]
        children = [subprocess.Popen(command) for _ in range(count)]
        door.settimeout(WAIT_S)
        channels = [Channel(door.accept()[0], f"follower {k}") for k in range(count)]
    try:
        yield channels
    finally:
        for channel in channels:
            channel.close()
        for child in children:
            child.wait(WAIT_S)


class Leader:
    """Plans for followers, and when each of them came to it."""

    def __init__(self, channels: Sequence[Channel]):
        self._channels, self._step = channels, 0
        self._heard: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()
        self._followers = Followers(channels, sys.exit)
        self._followers.hear = self._hear

    def _hear(self, rank: int, have: Have) -> None:
        self._heard.put((have.handoff, have.generation))

    def steps(self, rows: int, followers: int, samples: Samples) -> None:
        """Some steps, each begun when the one before is launched everywhere."""
        self._followers.channels = self._channels[:followers]
        for _ in range(REPEATS):
            self._step += 1
            plan = plan_of(rows, self._step)
            began = time.monotonic_ns()
            self._followers.plan(plan)
            here = time.monotonic_ns()
            there = [self._heard.get(timeout=WAIT_S) for _ in range(followers)]
            assert {number for number, _ in there} == {self._step}
            samples["leader", rows, followers].append((here - began) / 1e3)
            samples["late", rows, followers].append((max(at for _, at in there) - here) / 1e3)
            self._followers.over()

    def close(self) -> None:
        """The followers end."""
        self._followers.channels = self._channels
        self._followers.close()


class Told:
    """A lane's links to a front in another process."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "bench.lockstep_child", "front"]
        self._child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self._heard: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._links = Links(LANE, SECRET, lambda sender, it: self._heard.put(it.acknowledged), lambda peer: None)
        self._links.start()
        assert self._child.stdout is not None
        self._links.meet(FRONT, self._child.stdout.readline().strip())
        self.steps(1, defaultdict(list))  # dials

    def steps(self, rows: int, samples: Samples) -> None:
        """Some steps, each heard before the next."""
        emission = Emission(np.arange(rows), np.arange(rows, dtype=np.int32), np.full(rows, POSITIONS))
        for number in range(1, REPEATS + 1):
            began = time.monotonic_ns()
            self._links.post(FRONT, Packet(1, number, number, emission))
            here = time.monotonic_ns()
            samples["said", rows, 0].append((here - began) / 1e3)
            samples["heard", rows, 0].append((self._heard.get(timeout=WAIT_S) - began) / 1e3)

    def close(self) -> None:
        """The front ends with its lane."""
        self._links.close()
        with self._child:
            pass


def decode_steps(rows: Sequence[int]) -> Mapping[int, Callable[[], None]]:
    """A decode step of the embedded model on one CPU device, by rows."""
    config = from_hf(resolve("embedded").config())
    mesh = lane_meshes(MeshSpec(1, 1), config.heads, config.kv_heads)[0]
    weights = random_weights(config, mesh, np.dtype(np.float32))
    return {count: make(config, weights, mesh, count, POSITIONS) for count in rows}


def planned_s() -> float:
    """Seconds that a device of an H200 lane of 8 takes to read its share of an 8B model in bfloat16."""
    bandwidth = DEVICES["h200"].bytes_per_s
    assert bandwidth is not None
    return weights_bytes(from_hf(EIGHT_B), 8, 2) / bandwidth


def measure(rows: Sequence[int], followers: Sequence[int], turns: int) -> list[dict[str, float]]:
    """A row for each number of rows and followers."""
    samples: Samples = defaultdict(list)
    steps = decode_steps(rows)
    told = Told()
    with started(max(followers)) as channels:
        leader = Leader(channels)
        for _ in range(turns):
            for count in rows:
                for others in followers:
                    leader.steps(count, others, samples)
                told.steps(count, samples)
                began = time.perf_counter()
                steps[count]()
                samples["step", count, 0].append(1e3 * (time.perf_counter() - began))
        leader.close()
    told.close()
    middle = {key: median(values) for key, values in samples.items()}
    return [figures(middle, count, others) for count in rows for others in followers]


def figures(middle: Mapping[tuple[str, int, int], float], rows: int, followers: int) -> dict[str, float]:
    """Medians in microseconds, and the leader's own as shares of a step."""
    leader, said, step = (
        middle[each] for each in (("leader", rows, followers), ("said", rows, 0), ("step", rows, 0))
    )
    return {
        "rows": rows,
        "followers": followers,
        "leader us": leader,
        "late us": middle["late", rows, followers],
        "said us": said,
        "heard us": middle["heard", rows, 0],
        "CPU step ms": step,
        "leader % CPU": leader / step / 10,
        "said % CPU": said / step / 10,
        "H200 read ms": 1e3 * planned_s(),
        "leader % H200": leader / planned_s() / 1e4,
        "said % H200": said / planned_s() / 1e4,
    }


def main(arguments: list[str]) -> int:
    """The command line."""
    lines = parser("lockstep", __doc__)
    lines.add_argument(
        "--turns", type=int, default=15, metavar="N", help="medians over so many (default %(default)s)"
    )
    options = lines.parse_args(arguments)
    rows = measure(ROWS, FOLLOWERS, options.turns)
    show("the orders of a step to the followers of a lane, and its tokens to the front", rows)
    record("lockstep", arguments).append(rows, options.out)
    return 0
