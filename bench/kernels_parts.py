"""The parts of `bench kernels`: which jobs each has on a device, and in what processes they are done.

    Around (folder, sizes, device) -> jobs -> kernels_process.run within so many seconds -> rows

A part is a row of PARTS; its weight is its share of the time that is left when it begins, against those after it.
Nothing here touches a device: what it is comes from the part `facts`, told by a process that ended.
"""

import dataclasses
import importlib.util
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from bench import kernels_library, kernels_loads, kernels_step
from bench.kernels_cases import CHOSEN, Case, Decode, cases, small_cases
from bench.kernels_process import CHILD, ROOT, Job, Limits, Row, run, surroundings
from bench.kernels_serve import names, refusals
from bench.kernels_serve import shape_of as shape_of_row
from bench.kernels_speed import label, shape_of
from bench.record import machine
from pallas_kernels import served
from pallas_kernels.dispatch import Part
from pallas_kernels.dispatch import parts as step_parts
from pallas_kernels.target import Target

MEMORY = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92"}
WATCHED = {"XLA_PYTHON_CLIENT_ALLOCATOR": "platform"}  # arrays have bounds that compute-sanitizer knows
UNSEEN = {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
HOST_SHARE = 16  # of a host's memory, one part in so many is taken for a device's where there is none
START_S = 180
CEILINGS = ("read", "copy", "matmul", "link")


@dataclass(frozen=True, slots=True)
class Around:
    """What all parts know."""

    folder: Path
    small: bool
    words: str  # cases whose name holds them
    torch: str  # a Python
    told: Callable[[Row], None]
    target: Target | None = None
    memory_bytes: int = 0

    def knowing(self, facts: Row) -> "Around":
        """The same with the device's facts; a machine without a GPU takes small sizes."""
        target = Target(*(facts[field] for field in Target._fields))
        memory = facts["memory_bytes"] or (machine()["memory_bytes"] or 1 << 34) // HOST_SHARE
        small = self.small or target.platform == "cpu"
        return dataclasses.replace(self, target=target, memory_bytes=memory, small=small)

    @property
    def options(self) -> dict[str, object]:
        """For the process that does the jobs."""
        return {"small": self.small, "memory_bytes": self.memory_bytes, "folder": str(self.folder)}

    def cases(self) -> list[Case]:
        """Those asked for."""
        every = small_cases() if self.small else cases()
        return [case for case in every if self.words in label(case)]

    def wanted(self, jobs: list[Job]) -> list[Job]:
        """Those asked for."""
        return [job for job in jobs if self.words in job.case]


def facts(around: Around) -> Row:
    """Of the device that JAX finds, or an `error`."""
    return run([Job("facts", "device")], around.options, Limits(START_S), lambda row: None, environment=MEMORY)[0]


def ceilings(around: Around, limit_s: float) -> list[Row]:
    """What the device can do."""
    jobs = [Job("ceilings", name) for name in CEILINGS]
    return run(jobs, around.options, Limits(limit_s), around.told, environment=MEMORY)


def check_jobs(around: Around) -> list[Job]:
    """Each served row by each kernel that serves it, XLA where none does; first by those that are chosen.

    A row named for another device is the same step. Of small ones one stands for each kernel and dtype.
    """
    ranked = []
    for row in served.SERVED:
        part = step_parts(row.numerics, not row.rows)[-1]
        able = names(part, around.target, shape_of_row(row))
        asked = able[:-1] or able
        ranked += [(rank, Job("check", row.name, by, part)) for rank, by in enumerate(asked)]
    jobs = around.wanted([job for _, job in sorted(ranked, key=lambda each: each[0])])
    rows = {row.name: row for row in served.SERVED}
    firsts: dict[tuple, Job] = {}
    for job in jobs:
        row = rows[job.case]
        same = row.pool or row.dtype if around.small else row._replace(target="", by="")
        firsts.setdefault((same, job.by, job.piece), job)
    return list(firsts.values())


def check(around: Around, limit_s: float) -> list[Row]:
    """Is each kernel right?"""
    return run(check_jobs(around), around.options, Limits(limit_s), around.told, environment=MEMORY)


def speed(around: Around, limit_s: float) -> list[Row]:
    """How fast is it? Those that are chosen come first; who does not serve a case is said."""
    ranked, rows = [], []
    for case in around.cases():
        part: Part = case.part
        shape = shape_of(case)
        able = names(part, around.target, shape)
        chosen = [CHOSEN if by == able[0] != "xla" else "" for by in able]
        each = enumerate(zip(able, chosen, strict=True))
        ranked += [(rank, Job("speed", label(case), *by)) for rank, by in each]
        for by, reason in refusals(part, around.target, shape).items():
            rows.append({"part": "speed", "case": label(case), "by": by, "skipped": reason})
    jobs = [job for _, job in sorted(ranked, key=lambda each: each[0])]
    return rows + run(jobs, around.options, Limits(limit_s), around.told, environment=MEMORY)


def library(around: Around, limit_s: float) -> list[Row]:
    """The same by JAX's own."""
    by = "xla" if around.target.platform == "cpu" else "cudnn"
    jobs = [Job("library", label(case), by) for case in around.cases() if kernels_library.unserved(case) is None]
    return run(jobs, around.options, Limits(limit_s), around.told, environment=MEMORY)


def torch(around: Around, limit_s: float) -> list[Row]:
    """The same by PyTorch, where its Python has it."""
    if around.torch == sys.executable:
        found = importlib.util.find_spec("torch") is not None
    else:
        found = subprocess.run([around.torch, "-c", "import torch"], capture_output=True).returncode == 0
    if not found:
        return [{"part": "torch", "case": "all", "skipped": "PyTorch is not installed"}]
    every = small_cases() if around.small else cases()
    jobs = [
        Job("torch", label(case), by, str(index))
        for index, case in enumerate(every)
        for by in (("sdpa",) if isinstance(case, Decode) else ("sdpa", "flex"))
        if kernels_library.unserved(case) is None and not getattr(case, "ragged", False)
        if around.words in label(case)
    ]
    command = (around.torch, "-W", "ignore", "-m", "bench.kernels_torch")
    return run(jobs, around.options, Limits(limit_s), around.told, command=command)


def step(around: Around, limit_s: float) -> list[Row]:
    """A whole decode step, each way in a process of its own."""
    rows, end_at = [], time.monotonic() + limit_s
    batches = kernels_step.BATCHES[:1] if around.small else kernels_step.BATCHES
    by_cost = [(batch, by, way) for batch in batches for by in ("kernels", "xla") for way in kernels_step.WAYS]
    for index, (batch, by, way) in enumerate(by_cost):
        folder = around.folder / f"step-{index}"
        folder.mkdir(exist_ok=True)
        environment = {"XLA_FLAGS": kernels_step.flags(way, folder), **MEMORY}
        if around.target.platform == "cpu":
            environment["XLA_FLAGS"] = environment["XLA_FLAGS"].replace(kernels_step.WAYS[way], "").strip()
        jobs = [Job("step", str(batch), by, way)]
        left = max(end_at - time.monotonic(), 0)
        share = Limits(min(left, 2 * limit_s / len(by_cost)))
        options = around.options | {"dump": str(folder)}
        rows += run(jobs, options, share, around.told, environment=environment)
    return rows


def loads(around: Around, limit_s: float) -> list[Row]:
    """Executables that are written without a GPU and run with one."""
    name = kernels_loads.target_name(around.target.kind)
    if name is None:
        words = f"no description of {around.target.kind or around.target.platform} to compile for"
        return [{"part": "loads", "case": "all", "skipped": words}]
    command = [sys.executable, "-W", "ignore", "-m", "bench.kernels_loads", around.target.kind, str(around.folder)]
    failed = call([*command, *kernels_loads.ROWS], limit_s / 2, UNSEEN)
    if failed:
        return [{"part": "loads", "case": "all", "error": f"compiling ahead: {failed}"}]
    jobs = [Job("loads", row) for row in kernels_loads.ROWS]
    return run(jobs, around.options, Limits(limit_s / 2), around.told, environment=MEMORY)


def sanitize(around: Around, limit_s: float) -> list[Row]:
    """compute-sanitizer over small checks: its tools find wrong addresses and races of shared memory."""
    if (tool := shutil.which("compute-sanitizer")) is None:
        return [{"part": "sanitize", "case": "all", "skipped": "compute-sanitizer is not on PATH"}]
    rows = []
    jobs = check_jobs(dataclasses.replace(around, small=True))
    options = around.options | {"small": True}
    for name in ("memcheck", "racecheck"):
        log = around.folder / f"{name}.log"
        command = (tool, "--tool", name, "--log-file", str(log), sys.executable, *CHILD)
        limits = Limits(limit_s / 2, patience_s=limit_s / 2)
        found = run(jobs, options, limits, around.told, command=command, environment=WATCHED)
        rows += [row | {"part": "sanitize", "piece": f"{name} {row['piece']}"} for row in found]
        rows.append({"part": "sanitize", "case": "all", "piece": name} | summary(log))
    return rows


def summary(log: Path) -> Row:
    """What compute-sanitizer says at its end, of the last process that it watched."""
    text = log.read_text(errors="replace") if log.exists() else ""
    counts = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", text)
    if not counts:
        return {"error": "it wrote no summary"}
    return {"errors": int(counts[-1]), "failed": text.strip().splitlines()[0] if int(counts[-1]) else ""}


def call(command: list[str], limit_s: float, environment: Mapping[str, str]) -> str:
    """Run to its end; if it failed, the last line of what it said."""
    around = surroundings(environment)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, env=around, cwd=ROOT)
    except subprocess.TimeoutExpired:
        return f"not done after {limit_s:.0f} s"
    return "" if done.returncode == 0 else (done.stderr.strip() or f"code {done.returncode}").splitlines()[-1]


class Described(NamedTuple):
    """A part, and its share of the time."""

    run: Callable[[Around, float], list[Row]]
    weight: float


PARTS = {
    "ceilings": Described(ceilings, 1),
    "check": Described(check, 6),
    "speed": Described(speed, 8),
    "library": Described(library, 2),
    "torch": Described(torch, 2),
    "step": Described(step, 4),
    "loads": Described(loads, 2),
    "sanitize": Described(sanitize, 5),
}
