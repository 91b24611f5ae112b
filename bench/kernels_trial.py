"""One config of a kernel on one served shape: right, without spills, and how fast. A job of `bench tune`.

check (small) -> .ptx files -> the assembler's count of spilled bytes -> time
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from bench.ahead_compile import assembled
from bench.kernels_cases import Case, Decode, Heads, Prefill
from bench.kernels_check import check
from bench.kernels_process import Job, Row
from bench.kernels_speed import measure
from pallas_kernels import served
from pallas_kernels.dispatch import KERNELS

Timer = Callable[[Case, str, int, tuple | None], float]


def trial(job: Job, options: Mapping, timer: Timer | None = None) -> Row:
    """Figures of the config that the job names: `us`, or `failed` with why it cannot be used."""
    asked = json.loads(job.piece)
    part, fields = asked["part"], asked["config"]
    config = dict(KERNELS[part])[job.by].Config(**fields) if fields else None
    dump = Path(options["dump"])
    for file in dump.glob("*"):
        file.unlink()
    figures = check(job.case, part, job.by, not asked["full"] or options["small"], config)
    if figures["failed"] or asked["full"]:
        return figures
    spilled = spills(dump)
    if spilled:
        return {"failed": f"{spilled} bytes spill"}
    row = {row.name: row for row in served.SERVED}[job.case]
    return {"us": 1e6 * (timer or seconds)(case_of(row), job.by, options["memory_bytes"], config)}


def spills(dump: Path) -> int | None:
    """Bytes that the kernels in a folder of .ptx files spill; None where there is no assembler to ask."""
    try:
        return sum(assembled(file, file.read_text())["spill_bytes"] for file in dump.glob("*.ptx"))
    except FileNotFoundError:
        return None


def seconds(case: Case, by: str, memory_bytes: int, config: tuple | None) -> float:
    """Of one call."""
    return next(measure(case, by, memory_bytes, config))["us"] / 1e6


def case_of(row: served.Row) -> Case:
    """What stands for a served row: half its table full, before chunks as well, which are one sequence's."""
    model = served.MODELS[row.model]
    heads = Heads(model.heads, model.kv_heads, model.head_width)
    positions = row.columns * row.block // 2
    pool = row.pool or row.dtype
    if not row.rows:
        return Decode(row.name, heads, row.tokens, (positions,), row.block, pool, dtype=row.dtype)
    return Prefill(row.name, heads, row.tokens, positions, row.block, pool, dtype=row.dtype)
