"""The fastest config of each kernel on this device: tried, checked, timed, written for pallas_kernels/tuned.py.

    served shapes x parts -> the kernel that serves each -> its grid (GRIDS), the rule first
      each config     checked beside float64 (small), spills read from the assembler, timed
      the fastest     checked at full size; kept if it beats the rule by more than GAIN

Each config is a job of its own, so that one that breaks the device is lost alone. What a run does not reach keeps
the entry that it had. Cost: some 15 seconds a config, 20 configs a shape; --dry lists them.
"""

import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from bench import kernels_parts
from bench.kernels import progress
from bench.kernels_parts import MEMORY, Around
from bench.kernels_process import Job, Limits, Row, run
from bench.kernels_serve import names, shape_of
from bench.record import commit, gpu, parser, record, show
from pallas_kernels import served, tuned
from pallas_kernels.dispatch import KERNELS
from pallas_kernels.shape import Shape
from pallas_kernels.target import Target

GAIN = 0.02  # of the rule's time; what is less may be chance
GRIDS: Mapping[tuple[str, str], Mapping[str, tuple[int, ...]]] = {
    ("decode", "mosaic"): {"stages": (2, 3, 4, 5, 6), "resident": (1, 2)},
    ("decode", "triton"): {"tile": (32, 64), "splits": (1, 2, 4, 8, 16), "warps": (4, 8)},
    ("chunks", "mosaic"): {"tile": (64, 128), "stages": (2, 3, 4), "heads": (1, 2, 4, 8)},
    ("chunks", "triton"): {"rows": (64, 128), "tile": (32, 64, 128), "warps": (4, 8), "stages": (2, 3)},
}
Config = Mapping[str, int]
RULE: Config = {}
Do = Callable[[Sequence[Job]], list[Row]]


class Point(NamedTuple):
    """A served step, one part of it, and the kernel that serves it."""

    row: served.Row
    part: str
    kernel: str

    @property
    def shape(self) -> Shape:
        """As the dispatcher sees it."""
        return shape_of(self.row)

    @property
    def key(self) -> tuned.Key:
        """Where its entry stands."""
        return tuned.key(self.part, self.shape, self.row.tokens)

    def job(self, config: Config, full: bool = False) -> Job:
        """To check and time a config; `full` checks it at full size and no more."""
        piece = json.dumps({"part": self.part, "config": dict(config), "full": full})
        return Job("tune", self.row.name, self.kernel, piece)


def main(arguments: list[str]) -> int:
    """Tune every point; 0 when something was written or nothing had to be."""
    options = parser("tune", __doc__)
    options.add_argument("--dry", action="store_true", help="list the points and their configs")
    options.add_argument("--case", default="", metavar="WORDS", help="served shapes whose name holds these words")
    options.add_argument("--seconds", type=float, default=3600, help="begin nothing afterwards (default 3600)")
    options.add_argument("--folder", type=Path, default=tuned.FOLDER, help="where the file goes")
    options.add_argument(
        "--target", choices=sorted(served.TARGETS), help="with --dry: of a device that is not here"
    )
    chosen = options.parse_args(arguments)
    if chosen.dry and chosen.target:
        return dry(points(served.TARGETS[chosen.target], chosen.case))
    with TemporaryDirectory(prefix="serac-tune-") as folder:
        around = Around(Path(folder), False, "", sys.executable, progress(time.monotonic()))
        facts = kernels_parts.facts(around)
        if "error" in facts:
            print(f"bench tune: no device: {facts['error']}", file=sys.stderr)
            return 1
        around = around.knowing(facts)
        every = points(around.target, chosen.case)
        if chosen.dry or not every:
            return dry(every)
        end_at = time.monotonic() + chosen.seconds
        found = tune(every, lambda jobs: do(jobs, around, Path(folder), end_at))
    record("tune", arguments).append(found, chosen.out)
    file = tuned.file_of(around.target, chosen.folder)
    file.write_text(written(file, around.target, every, found, run_facts(facts)), encoding="utf-8")
    show(f"{file.name}: configs against the kernels' rules", [line(row) for row in found])
    return 0


def do(jobs: Sequence[Job], around: Around, folder: Path, end_at: float) -> list[Row]:
    """The jobs in processes that write what they assemble."""
    dump = folder / "dump"
    dump.mkdir(exist_ok=True)
    flags = f"--xla_dump_to={dump} --xla_dump_emitter_re=ptx --xla_dump_hlo_pass_re=NONE"
    environment = {"MOSAIC_GPU_DUMP_TO": str(dump), "XLA_FLAGS": flags, **MEMORY}
    options = around.options | {"dump": str(dump)}
    limits = Limits(max(end_at - time.monotonic(), 0))
    return run(jobs, options, limits, around.told, environment=environment)


def points(target: Target, words: str = "") -> list[Point]:
    """One for each key, of the shapes that a kernel serves on `target`."""
    found: dict[tuned.Key, Point] = {}
    for row in served.SERVED:
        part = "chunks" if row.rows else "decode"
        first = names(part, target, shape_of(row))[0]
        if row.numerics == "fast" and words in row.name and first != "xla":
            point = Point(row, part, first)
            found.setdefault(point.key, point)
    return list(found.values())


def grid(part: str, kernel: str) -> Iterator[Config]:
    """Every config of a kernel's grid. Raises ValueError where the grid names what its Config does not have."""
    values = GRIDS.get((part, kernel), {})
    fields = dict(KERNELS[part])[kernel].Config._fields
    if unknown := sorted(values.keys() - set(fields)):
        raise ValueError(f"{part} of {kernel} has no {', '.join(unknown)}, only {', '.join(fields)}: change GRIDS")
    for each in itertools.product(*values.values()):
        yield dict(zip(values, each, strict=True))


def dry(every: Sequence[Point]) -> int:
    """List what would be tried."""
    for point in every:
        print(f"{point.row.name}: {point.part} by {point.kernel}, tokens up to {point.key.tokens}")
        for config in grid(point.part, point.kernel):
            print("    " + ", ".join(f"{field} {value}" for field, value in config.items()))
    if not every:
        print("no kernel serves anything here: there is nothing to tune")
    return 0


def tune(every: Sequence[Point], do: Do) -> list[Row]:
    """A row of figures for each point: the best config that is right, beside the rule."""
    configs = {point: [RULE, *grid(point.part, point.kernel)] for point in every}
    jobs = {(point, index): point.job(c) for point in every for index, c in enumerate(configs[point])}
    came: dict[Job, Row] = {}
    for row in do(list(jobs.values())):
        came[Job(*(row[field] for field in Job._fields))] = row
    found = []
    for point in every:
        timed = [(came[jobs[point, index]], config) for index, config in enumerate(configs[point])]
        found.append(best(point, timed, do))
    return found


def best(point: Point, timed: Sequence[tuple[Row, Config]], do: Do) -> Row:
    """The fastest config that is right at full size too; `config` is empty where the rule stays."""
    rule_us = timed[0][0].get("us")
    usable = sorted(((row["us"], index) for index, (row, _) in enumerate(timed) if "us" in row))
    found = {"case": point.row.name, "part": point.part, "kernel": point.kernel, **point.key._asdict()}
    found |= {"rule_us": rule_us, "tried": len(timed), "timed": len(usable), "config": {}, "us": rule_us}
    for us, index in usable:
        config = timed[index][1]
        if config == RULE or rule_us is not None and us > (1 - GAIN) * rule_us:
            break
        full = do([point.job(config, full=True)])[0]
        if not full.get("failed") and "error" not in full and "skipped" not in full:
            return found | {"config": dict(config), "us": us}
    return found


def written(file: Path, target: Target, every: Sequence[Point], found: Sequence[Row], facts: Row) -> str:
    """The text of the file: what it held of other points stays."""
    whole = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"runs": [], "entries": []}
    runs = [*whole["runs"], facts]
    reached = {point.key for point, row in zip(every, found, strict=True) if row["timed"]}
    kept = [e for e in whole["entries"] if tuned.Key(*(e[field] for field in tuned.Key._fields)) not in reached]
    fields = (*tuned.Key._fields, "kernel", "config", "us", "rule_us")
    fresh = [{field: row[field] for field in fields} | {"run": len(runs) - 1} for row in found if row["config"]]
    entries = sorted([*kept, *fresh], key=lambda e: json.dumps([e[field] for field in tuned.Key._fields]))
    used = sorted({entry["run"] for entry in entries})
    entries = [entry | {"run": used.index(entry["run"])} for entry in entries]
    head = {"schema": tuned.SCHEMA, "device": target.kind, "runs": [runs[index] for index in used]}
    text = json.dumps(head | {"entries": entries}, indent=1) + "\n"
    tuned.parse(file.name, text)
    return text


def run_facts(facts: Row) -> Row:
    """What stands beside the entries of a run."""
    driver = gpu().get("driver")
    return {"date": f"{datetime.now(UTC):%Y-%m-%d}", "jax": facts["jax"], "driver": driver, **commit()}


def line(row: Row) -> Row:
    """A row of the table."""
    config = ", ".join(f"{field} {value}" for field, value in row["config"].items()) or "the rule"
    shown = {name: row[name] for name in ("case", "part", "kernel", "tokens", "tried", "timed", "rule_us", "us")}
    return shown | {"config": config}
