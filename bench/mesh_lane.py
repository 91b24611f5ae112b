"""One row of `python -m bench mesh`: a lane on one mesh, in a process whose devices were chosen before JAX started.

    model -> plan -> weights, pool, programs compiled -> prompts: prefill, then decode -> one JSON object on stdout

The production scheduler and runner, two steps in flight, greedy, no prefix cache, EOS ignored: every run draws the
same number of tokens. Prefill is timed until every prompt is computed and collected, decode from there on. Medians
of the repeats; the first is not counted.
"""

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import jax
import numpy as np

from bench.programs import by_kind, collectives
from bench.record import parser
from engine.config import Settings
from engine.core import prefix
from engine.core.events import Emission
from engine.core.request import Request, Sampling, Stopping
from engine.core.scheduler import LaneShape, Scheduler
from engine.models.config import ModelConfig, from_hf
from engine.planning import DEVICES, Device, Plan, Step, decide, estimate
from engine.runner.buckets import Bucket
from engine.runner.runner import Model, Runner
from engine.weights.drawn import random_weights
from engine.weights.load import load
from engine.weights.source import resolve
from pallas_kernels.dispatch import target_of
from sharding.mesh import lane_meshes, parse_mesh

IN_FLIGHT = 2


@dataclass(frozen=True, slots=True)
class Timed:
    """One run over the prompts; `tokens` are what each sequence drew."""

    prefill_s: float
    decode_s: float
    decode_steps: int
    decode_tokens: int
    tokens: list[list[int]]


def main(arguments: Sequence[str]) -> int:
    """Measure one mesh and print its row."""
    chosen = options().parse_args(arguments)
    folder = resolve(chosen.model)
    config, spec = from_hf(folder.config()), parse_mesh(chosen.mesh)
    if chosen.layers is not None:
        config = dataclasses.replace(config, num_layers=chosen.layers, windows=config.windows[: chosen.layers])
    settings = Settings(
        model=chosen.model,
        mesh=chosen.mesh,
        dtype=chosen.dtype,
        numerics=chosen.numerics,
        max_model_len=chosen.prompt + chosen.output,
        max_num_seqs=chosen.rows,
        max_num_batched_tokens=chosen.tokens,
    )
    device = device_here()
    choice = decide(settings, config, spec, device)
    plan = estimate(config, spec, device, choice)
    mesh = lane_meshes(spec, config.heads, config.kv_heads)[0]
    if chosen.random:
        weights = random_weights(config, mesh, choice.dtype)
    else:
        weights = load(folder, config, mesh, choice.dtype)
    buckets = needed(plan) if chosen.programs == "needed" else tuple(step.bucket for step in plan.steps)
    runner = Runner(Model(config, weights, mesh, choice.dtype, choice.numerics), choice.sizes, buckets)
    runner.warm_up()
    prompts = np.random.default_rng(1).integers(0, config.vocab, (chosen.rows, chosen.prompt)).tolist()
    runs = [run(config, plan, runner, prompts, chosen.output) for _ in range(chosen.repeats + 1)][1:]
    print(json.dumps(row(plan, runner, runs, chosen.rows * chosen.prompt)), flush=True)
    return 0


def options() -> argparse.ArgumentParser:
    """The options of the bench, which hands them through."""
    lines = parser("mesh_lane", __doc__)
    lines.add_argument("--mesh", required=True, help="of this row")
    add_options(lines)
    return lines


def add_options(lines: argparse.ArgumentParser) -> None:
    """What is measured, the same on every mesh."""
    lines.add_argument("--model", default="embedded", help="as serac serve takes it (default embedded)")
    lines.add_argument("--random", action="store_true", help="random weights in the shape of the model")
    lines.add_argument("--layers", type=int, help="of the model, instead of all; wants --random")
    lines.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    lines.add_argument("--numerics", default="fast", choices=("fast", "invariant"))
    lines.add_argument("--rows", type=int, default=4, help="sequences at once (default 4)")
    lines.add_argument("--tokens", type=int, default=128, help="most tokens in a step (default 128)")
    lines.add_argument("--prompt", type=int, default=96, help="tokens of a prompt (default 96)")
    lines.add_argument("--output", type=int, default=64, help="tokens drawn for each (default 64)")
    lines.add_argument("--repeats", type=int, default=3, help="runs counted (default 3)")
    lines.add_argument("--programs", default="all", choices=("all", "needed"), help="which to compile")


def device_here() -> Device:
    """The first visible device, as a plan wants it."""
    first = jax.devices()[0]
    target = target_of(first)
    limit = (first.memory_stats() or {}).get("bytes_limit")
    return DEVICES["cpu"] if target.platform == "cpu" else Device(target, limit, None)


def needed(plan: Plan) -> tuple[Bucket, ...]:
    """The programs that the measurement runs, and the largest that gathers logits."""
    buckets = [step.bucket for step in plan.steps]
    kinds = ((True, False), (False, False), (False, True))
    return tuple(max(b for b in buckets if (b.one_token, b.full) == kind) for kind in kinds)


def run(config: ModelConfig, plan: Plan, runner: Runner, prompts: list[list[int]], output: int) -> Timed:
    """Compute all prompts, then draw `output` tokens for each."""
    sizes = plan.choice.sizes
    shape = LaneShape(
        sizes.num_blocks,
        sizes.block_size,
        sizes.max_rows,
        plan.choice.max_tokens,
        sizes.max_length,
        config.vocab,
        prefix_cache=False,
    )
    scheduler = Scheduler(shape, prefix.root("bench"))
    stopping = Stopping(max_tokens=output, ignore_eos=True)
    for number, ids in enumerate(prompts):
        scheduler.submit(Request(str(number), tuple(ids), Sampling(temperature=0.0), stopping), number)
    drawn: dict[int, list[int]] = {number: [] for number in range(len(prompts))}
    began = time.perf_counter()
    while scheduler.waiting or scheduler.prefilling:
        turn(scheduler, runner, drawn)
    while scheduler.flights:
        collect(scheduler, runner, drawn)
    computed = time.perf_counter()
    before, steps = sum(map(len, drawn.values())), 0
    while not scheduler.idle:
        steps += turn(scheduler, runner, drawn)
    ended = time.perf_counter()
    tokens = sum(map(len, drawn.values())) - before
    return Timed(computed - began, ended - computed, steps, tokens, [drawn[k] for k in sorted(drawn)])


def turn(scheduler: Scheduler, runner: Runner, drawn: dict[int, list[int]]) -> int:
    """Launch a step if one can be, else collect one; how many were launched."""
    plan = scheduler.plan(0.0) if len(scheduler.flights) < IN_FLIGHT else None
    if plan is None:
        collect(scheduler, runner, drawn)
        return 0
    runner.launch(plan)
    return 1


def collect(scheduler: Scheduler, runner: Runner, drawn: dict[int, list[int]]) -> None:
    """Take the oldest step in, and keep what it drew."""
    scheduler.collect(runner.collect())
    for event in scheduler.events:
        if isinstance(event, Emission):
            for serial, token in zip(event.serials.tolist(), event.tokens.tolist(), strict=True):
                drawn[serial].append(token)
    scheduler.events.clear()


def row(plan: Plan, runner: Runner, runs: list[Timed], prompt_tokens: int) -> dict[str, object]:
    """The figures of this mesh; bytes are those of one device."""
    programs = runner.programs
    steps = {step.bucket: step for step in plan.steps if step.bucket in programs}
    actual = {bucket: by_kind(collectives(programs[bucket].text())) for bucket in steps}
    return {
        "mesh": str(plan.spec),
        "device": jax.devices()[0].device_kind,
        "axes": f"kv={plan.kv_ways},rep={plan.kv_copies}",
        "prefill tokens/s": median(prompt_tokens / run.prefill_s for run in runs),
        "decode tokens/s": median(run.decode_tokens / run.decode_s for run in runs),
        "decode step ms": median(run.decode_s / run.decode_steps * 1e3 for run in runs),
        "executables": len(programs),
        "compile s": sum(program.compile_s for program in programs.values()),
        "compiled late": runner.compiles.late,
        "programs": [sent(steps[bucket], actual[bucket]) for bucket in steps],
        "collectives as planned": all(actual[bucket] == by_kind(steps[bucket].collectives) for bucket in steps),
        "memory": memory(plan, runner),
        "tokens": runs[0].tokens,
        "repeats equal": all(run.tokens == runs[0].tokens for run in runs),
    }


def sent(step: Step, actual: dict[str, tuple[int, int]]) -> dict[str, object]:
    """Collectives of one program, actual and planned; result bytes on one device."""
    return {
        "program": str(step.bucket),
        "tokens": step.bucket.tokens,
        "actual": {kind: {"calls": calls, "bytes": size} for kind, (calls, size) in actual.items()},
        "planned": {each.kind: {"calls": each.calls, "bytes": each.result_bytes} for each in step.collectives},
    }


def memory(plan: Plan, runner: Runner) -> dict[str, dict[str, int]]:
    """Bytes of one device, actual and planned."""
    state = runner.state
    rest = (state.history_RS, state.table_RM, runner.draws)
    temporaries = max(program.temp_bytes or 0 for program in runner.programs.values())
    pairs = {
        "weights": (_local_bytes(runner.model.weights), plan.weights_bytes),
        "kv": (_local_bytes((state.k, state.v)), plan.kv_bytes),
        "state": (_local_bytes(rest), plan.state_bytes),
        "temporaries": (temporaries, plan.temporary_bytes),
    }
    return {name: {"actual": actual, "planned": planned} for name, (actual, planned) in pairs.items()}


def _local_bytes(tree) -> int:
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
