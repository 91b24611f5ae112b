"""`serac replay`: a runner as the log describes it, the log run on it, and what came out, in a few lines.

    header -> the same revision, sizes and dtype, or a refusal -> weights, programs -> replay -> report, 0 or 1

Another mesh, device or model folder may be named: that the same bits come out there is what invariant numerics
promise. In fast numerics log-probabilities may differ by TOLERANCE; equality is reported, not promised.
"""

import sys
from dataclasses import replace
from typing import TextIO

import numpy as np
from jax.sharding import Mesh

from engine.clock import SystemClock
from engine.config import Settings
from engine.errors import ConfigError, Malformed, ModelError, wrong
from engine.models.config import ModelConfig, from_hf
from engine.observe.plan_log import Header, PlanLog
from engine.planning import KV_DTYPES, Choice
from engine.progress import progress
from engine.replica.build import choose, make_runner, plan_header, use_compile_cache
from engine.replica.replay import Outcome, Replay
from engine.weights.source import resolve

TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.02}  # of log-probabilities, in fast numerics
FIXED = (
    "revision",
    "dtype",
    "kv_dtype",
    "vocab",
    "num_blocks",
    "block_size",
    "max_rows",
    "max_length",
    "max_tokens",
)
MUCH = 1 << 60  # bytes for blocks: their number is the log's
VERSIONS = ("device", "serac", "jax", "jaxlib")


def run(log: PlanLog, settings: Settings, out: TextIO) -> int:
    """Replay `log` on what `settings` name and say what came out. Returns the exit code.

    Raises ConfigError or ModelError where the model here is another, Malformed where the log is damaged.
    """
    folder = resolve(settings.model)
    config = from_hf(folder.config())
    choice, mesh = chosen(log.header, settings, config)
    here = plan_header(log.header.lane, settings.model, folder, config, choice, mesh)
    check_same(log.header, here)
    use_compile_cache(settings.compile_cache)
    with progress(sys.stderr) as bar:
        runner = make_runner(replace(settings, allow_non_finite=True), folder, config, choice, mesh, bar.show)
    exact = log.header.numerics == here.numerics == "invariant"
    replay = Replay(log, runner, 0.0 if exact else TOLERANCE[here.dtype], SystemClock())
    show_header(log, here, out)
    try:
        replay.run()
    except Malformed:
        show_outcome(replay.outcome, log.lost_bytes, out)
        raise
    show_outcome(replay.outcome, log.lost_bytes, out)
    return 0 if replay.outcome.equal else 1


def chosen(header: Header, settings: Settings, config: ModelConfig) -> tuple[Choice, Mesh]:
    """What the log ran with, on the mesh of `settings`. Raises ConfigError."""
    logged = replace(
        settings,
        dtype=header.dtype,
        kv_dtype=next((name for name, kind in KV_DTYPES.items() if kind == header.kv_dtype), "auto"),
        max_model_len=header.max_length,
        block_size=header.block_size,
        max_num_seqs=header.max_rows,
        max_num_batched_tokens=header.max_tokens,
        kv_memory=MUCH,
    )
    _, meshes, choices = choose(logged, config, np.dtype(np.float32))
    if len(meshes) != 1:
        raise ConfigError(wrong("mesh", settings.mesh, "one lane, such as tp=4, as a log is"), field="mesh")
    sizes = replace(choices[0].sizes, num_blocks=header.num_blocks)
    return choices[0]._replace(sizes=sizes), meshes[0]


def check_same(logged: Header, here: Header) -> None:
    """Raise ModelError where the model here is not the one of the log."""
    for name in FIXED:
        was, found = getattr(logged, name), getattr(here, name)
        if was != found:
            expected = f"{was}, as the log says: it can only be replayed on the same model, sizes and dtype"
            raise ModelError(wrong(name, found, expected), field=name)


def show_header(log: PlanLog, here: Header, out: TextIO) -> None:
    """What was logged and what it runs on now."""
    was = log.header
    print(f"{log.path}: lane {was.lane} of {was.model}, revision {was.revision[:12]}, {was.dtype}", file=out)
    print(f"logged on {was.mesh}, {was.numerics}; replayed on {here.mesh}, {here.numerics}", file=out)
    for name in VERSIONS:
        if getattr(was, name) != getattr(here, name):
            print(f"{name} was {getattr(was, name)}, is {getattr(here, name)}", file=out)


def show_outcome(outcome: Outcome, lost_bytes: int, out: TextIO) -> None:
    """What came out, a fact a line."""
    pace = outcome.steps / outcome.seconds if outcome.seconds else 0.0
    lines = [f"{outcome.steps} steps, {outcome.rows} rows, {outcome.points} points compared, {pace:.1f} steps/s"]
    asides = {
        "resets": outcome.resets,
        "steps that had failed": outcome.failures,
        "steps whose results the log does not hold": outcome.unanswered,
        "bytes of a cut record at the end, lost": lost_bytes,
    }
    lines += [f"{count} {words}" for words, count in asides.items() if count]
    if outcome.moved:
        lines.append("ended where blocks came from another lane: their content is not in the log")
    if outcome.first is not None:
        first = outcome.first
        place = f"step {first.step}, point {first.point}, {first.what}"
        lines.append(f"first difference: {place}: wanted {first.wanted}, got {first.got}")
    lines.append(f"{outcome.different} points differ" if outcome.different else "equal")
    print("\n".join(lines), file=out, flush=True)
