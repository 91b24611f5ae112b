"""What a step costs the host while the device does nothing: schedule, pack and collect, by number of running rows.

    Scheduler.plan -> Runner.launch: pick a bucket, pack one integer array -> (device) -> Runner.collect, settle
    schedule          pack                                                    nothing     collect

The production scheduler and runner run as they are; the compiled programs are replaced by one that returns a
result at once, so neither JAX's dispatch nor a copy from a device is in the figures, and no text or stream either.
All rows decode, two steps in flight, block boundaries spread over the steps. A second pass with a stopwatch around
the parts says where the time goes; each reading adds about 0.2 us to it. `replacing one` is a step in which one
sequence leaves and another is seated, its record packed and its prompt begun.
"""

import time
from collections.abc import Callable
from statistics import median, quantiles

import jax
import numpy as np

from bench.record import parser, record, show
from engine.core import prefix
from engine.core.request import Request, Sampling
from engine.core.scheduler import LaneShape, Scheduler
from engine.models.config import ModelConfig, Rope
from engine.runner.buckets import buckets
from engine.runner.runner import Model, Program, Runner
from engine.runner.state import Sizes, load_lengths
from engine.runner.step import PLAIN_WIDTH
from sharding.mesh import MeshSpec, lane_meshes

AIMS_US = {64: 30.0, 4096: 50.0}
VOCAB, EOS = 4096, 0
FILL_TOKENS = 8192  # of prompts a step, until every row decodes
WARM_STEPS = 32
QUIET_SHARE = 5  # a machine that others use interrupts a step now and then
PARTS = {  # name -> the method whose time it is; one inside another is charged to the inner one
    "cohort": "rows.cohort",
    "take blocks": "pool.take",
    "grow tables": "rows.grow",
    "advance": "rows.decode",
    "write plan": "_launch",
    "receive": "rows.receive",
}


class Result(np.ndarray):
    """A device result that is on the host already."""

    def copy_to_host_async(self) -> None:
        """Nothing to wait for."""


class Lane:
    """A scheduler and a runner whose device answers at once."""

    def __init__(self, num_rows: int, block_size: int, max_length: int, prompt: int, steps: int):
        filling = 2 * num_rows * prompt // FILL_TOKENS + WARM_STEPS
        blocks = 2 + num_rows * -(-(2 * prompt + filling + steps) // block_size)
        tokens = num_rows + FILL_TOKENS
        shape = LaneShape(blocks, block_size, num_rows, tokens, max_length, VOCAB, (EOS,), prefix_cache=False)
        self.scheduler = Scheduler(shape, prefix.root("bench"))
        self.runner = _stubbed(Sizes(blocks, block_size, num_rows, max_length), tokens)
        self._rng, self._prompt = np.random.default_rng(num_rows), prompt
        for _ in range(num_rows):
            self.submit()

    def submit(self) -> None:
        """Queue one more sequence, which goes on to the end of the context."""
        ids = self._rng.integers(1, VOCAB, self._rng.integers(self._prompt, 2 * self._prompt)).tolist()
        self.scheduler.submit(Request("", tuple(ids), Sampling(temperature=0.0)), 0)

    def turn(self) -> tuple[int, int, int]:
        """Collect the oldest of two steps in flight and launch the next; nanoseconds of schedule, pack, collect."""
        clock, scheduler, runner = time.perf_counter_ns, self.scheduler, self.runner
        began = clock()
        if len(scheduler.flights) > 1:
            scheduler.collect(runner.collect())
        collected = clock()
        plan = scheduler.plan(0.0)
        planned = clock()
        if plan is not None:
            runner.launch(plan)
        packed = clock()
        scheduler.events.clear()
        return planned - collected, packed - planned, collected - began

    def fill(self) -> None:
        """Step until every row decodes and nothing but decodes is in flight."""
        while self.scheduler.waiting or self.scheduler.prefilling:
            self.turn()
        for _ in range(WARM_STEPS):
            self.turn()


def _stubbed(sizes: Sizes, max_tokens: int) -> Runner:
    """A runner of a model of nothing, whose programs are a function that returns a finished result."""
    config = ModelConfig(
        "none", 1, 8, 8, 1, 1, 2, VOCAB, sizes.max_length, 1e-6, Rope("default", 1e4), *[False] * 4, True, (None,)
    )
    mesh = lane_meshes(MeshSpec(), 1, 1)[0]
    runner = Runner(
        Model(config, {}, mesh, np.dtype(np.float32), "fast"), sizes, buckets(sizes.max_rows, max_tokens)
    )
    for bucket in runner.buckets:
        answer = np.ones((PLAIN_WIDTH, bucket.rows), np.int32).view(Result)
        runner.programs[bucket] = Program(bucket, _answering(answer), 0.0, None, str)
    runner._loads = {length: lambda state, draws, _: (state, draws) for length in load_lengths(sizes.max_length)}
    return runner


def _answering(answer: Result) -> Callable:
    return lambda weights, state, draws, packed: (state, answer)


class Stopwatch:
    """Charges time to named parts; a part inside another stops the outer one."""

    def __init__(self) -> None:
        self.spent: dict[str, int] = {}
        self._open: list[int] = []

    def wrap(self, owner: object, method: str, part: str) -> None:
        """Time every call of `owner.method` from now on."""
        inner, clock = getattr(owner, method), time.perf_counter_ns

        def timed(*arguments: object) -> object:
            self._open.append(0)
            began = clock()
            result = inner(*arguments)
            took = clock() - began
            self.spent[part] = self.spent.get(part, 0) + took - self._open.pop()
            if self._open:
                self._open[-1] += took
            return result

        setattr(owner, method, timed)


def breakdown(lane: Lane, steps: int) -> dict[str, float]:
    """Microseconds a step of each part, the slowest fifth of steps left out; the lane is of no further use."""
    watch = Stopwatch()
    for part, path in PARTS.items():
        owner, _, method = path.rpartition(".")
        watch.wrap(getattr(lane.scheduler, owner) if owner else lane.scheduler, method, part)
    watch.wrap(lane.scheduler, "plan", "rest of schedule")
    watch.wrap(lane.scheduler, "collect", "rest of settle")
    watch.wrap(lane.runner, "launch", "pack")
    watch.wrap(lane.runner, "collect", "read result")
    turns = []
    for _ in range(steps):
        watch.spent = {}
        lane.turn()
        turns.append(watch.spent)
    kept = sorted(turns, key=lambda spent: sum(spent.values()))[: -steps // QUIET_SHARE or None]
    parts = dict.fromkeys([*PARTS, *(part for spent in kept for part in spent)])
    return {part: sum(spent.get(part, 0) for spent in kept) / len(kept) / 1e3 for part in parts}


def replacing(lane: Lane, steps: int) -> float:
    """Microseconds of a step in which one sequence leaves and another takes its place."""
    clock, took = time.perf_counter_ns, []
    for _ in range(steps):
        oldest = next(iter(lane.scheduler.running.values()))
        began = clock()
        lane.scheduler.cancel(oldest)
        left = clock()
        lane.submit()
        took.append(left - began + sum(lane.turn()))
    return median(took) / 1e3


def measure(num_rows: int, steps: int, block_size: int, max_length: int, prompt: int) -> dict[str, object]:
    """One row of the table; times in microseconds a step."""
    lane = Lane(num_rows, block_size, max_length, prompt, 3 * steps + 2 * WARM_STEPS)
    lane.fill()
    turns = [lane.turn() for _ in range(steps)]
    totals = [sum(turn) / 1e3 for turn in turns]
    schedule, pack, collect = (median(part) / 1e3 for part in zip(*turns, strict=True))
    tenths = quantiles(totals, n=10)
    replaced = replacing(lane, steps)
    return {
        "rows": num_rows,
        "step us": median(totals),
        "aim us": AIMS_US.get(num_rows),
        "quiet us": tenths[0],
        "p90 us": tenths[-1],
        "schedule": schedule,
        "pack": pack,
        "collect": collect,
        "replacing one": replaced,
        "parts": breakdown(lane, steps),
    }


def main(arguments: list[str]) -> int:
    """Measure each number of rows and show where the time goes."""
    options = parser("host", __doc__)
    options.add_argument("--rows", default="1,64,256,1024,4096", help="numbers of running rows")
    options.add_argument("--steps", type=int, default=300, help="steps measured for each")
    options.add_argument("--block-size", type=int, default=64)
    options.add_argument("--max-length", type=int, default=2048)
    options.add_argument("--prompt", type=int, default=64, help="prompts have 1 to 2 times as many tokens")
    chosen = options.parse_args(arguments)
    jax.config.update("jax_platforms", "cpu")
    sizes = (chosen.steps, chosen.block_size, chosen.max_length, chosen.prompt)
    rows = [measure(int(number), *sizes) for number in chosen.rows.split(",")]
    show("host cost of a step; quiet is the first tenth of the steps", rows)
    show("where it goes, us a step", [{"rows": row["rows"], **row["parts"]} for row in rows])
    record("host", arguments).append(rows, chosen.out)
    return 0
