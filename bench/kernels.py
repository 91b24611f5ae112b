"""Every kernel on this machine's GPU: right first, then how near to what the device can do, in one call.

    facts -> ceilings -> check -> speed -> library -> torch -> step [-> loads] [-> sanitize] -> tables

    ceilings    reading, copying, a large product, from call to call: measured in the same run
    check       each served shape by each kernel beside float64, with traps (kernels_check.py)
    speed       decode and prefill by each implementation, as shares of ceilings, beside goals (kernels_speed.py)
    library     cuDNN through jax.nn, for contiguous keys      torch   PyTorch's, where it is installed
    step        a whole decode step with and without kernels, with and without command buffers
    loads       executables written where no GPU is seen       sanitize   compute-sanitizer over small checks

Each part has processes of its own (kernels_process.py): what a kernel breaks is lost with its row. Lines say what
comes as it comes; tables stand last. The code is 1 if a check failed, anything crashed or a kernel misses what it
has to ship. Without a GPU it runs small and shows that everything runs; its speeds mean nothing.
Cost: half an hour for all of it; --seconds shares out less, what matters most first.
"""

import argparse
import dataclasses
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from bench import kernels_parts
from bench.kernels_judge import judged, missed, ratios, tables
from bench.kernels_parts import PARTS, Around
from bench.kernels_process import Row
from bench.record import parser, record, show
from engine.tables import readable

USUAL = ("ceilings", "check", "speed", "library", "torch", "step")


def main(arguments: list[str]) -> int:
    """Run the parts that were asked for; 0 when all is right and nothing misses what it has to ship."""
    chosen = options(arguments)
    with TemporaryDirectory(prefix="serac-bench-kernels-") as folder:
        around = Around(Path(folder), chosen.small, chosen.case, chosen.torch, progress(time.monotonic()))
        facts = kernels_parts.facts(around)
        if "error" in facts:
            print(f"bench kernels: no device: {facts['error']}", file=sys.stderr)
            return 1
        around = around.knowing(facts)
        about = {"device": facts["kind"] or facts["platform"], "jax": facts["jax"]}

        def keep(rows: Sequence[Row]) -> None:
            record("kernels", arguments).append([about | row for row in rows], chosen.out)

        rows = judged(run_parts(parts(chosen), around, chosen.seconds, keep))
    beside = ratios(rows)
    keep(beside)
    rows += beside
    for title, lines in tables(rows):
        show(title, lines)
    wrong = missed(rows, small=around.small)
    unseen = sum("skipped" in row for row in rows)
    print("\n".join([f"{len(wrong)} things are wrong, {unseen} were not measured", *wrong]))
    return int(bool(wrong))


def run_parts(names: Sequence[str], around: Around, seconds: float, keep: Callable) -> list[Row]:
    """The rows of all parts; those of a part are kept when it ends, and an interrupt ends them all."""
    end_at = time.monotonic() + seconds
    rows: list[Row] = []
    fresh: list[Row] = []  # of the part that runs

    def told(row: Row) -> None:
        fresh.append(row)
        around.told(row)

    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        for index, name in enumerate(names):
            fresh.clear()
            left = max(end_at - time.monotonic(), 0)
            weights = [PARTS[each].weight for each in names[index:]]
            share = left * weights[0] / sum(weights)
            fresh[:] = PARTS[name].run(dataclasses.replace(around, told=told), share)
            rows += fresh
            keep(judged(rows)[len(rows) - len(fresh) :])
    except KeyboardInterrupt:
        rows += [row for row in fresh if row not in rows]
        rows.append({"part": "all", "case": "what was left", "error": "interrupted"})
        keep(fresh)
    finally:
        signal.signal(signal.SIGTERM, before)
    return rows


def options(arguments: Sequence[str]) -> argparse.Namespace:
    """What the command line asks for."""
    lines = parser("kernels", __doc__)
    lines.add_argument("--only", metavar="PARTS", help=f"some of {','.join(PARTS)} (default {','.join(USUAL)})")
    lines.add_argument("--case", default="", metavar="WORDS", help="cases whose name holds these words")
    lines.add_argument("--seconds", type=float, default=1800, help="shared out among the parts (default 1800)")
    lines.add_argument("--small", action="store_true", help="tiny sizes; what a machine without a GPU takes anyway")
    lines.add_argument("--loads", action="store_true", help="executables written where no GPU is seen, too")
    lines.add_argument("--sanitize", action="store_true", help="compute-sanitizer over small checks, too")
    lines.add_argument("--torch", metavar="PYTHON", default=sys.executable, help="a Python that has torch")
    chosen = lines.parse_args(arguments)
    unknown = sorted(set(chosen.only.split(",")) - set(PARTS)) if chosen.only else []
    if unknown:
        lines.error(f"--only: got {', '.join(unknown)}; expected some of {', '.join(PARTS)}")
    return chosen


def parts(chosen: argparse.Namespace) -> list[str]:
    """Their names, in order."""
    wanted = set(chosen.only.split(",") if chosen.only else USUAL)
    wanted |= {name for name in ("loads", "sanitize") if getattr(chosen, name)}
    return [name for name in PARTS if name in wanted]


def progress(began_at: float) -> Callable[[Row], None]:
    """A function that tells a row in one line, with the seconds since the beginning."""

    def told(row: Row) -> None:
        words = " ".join(str(row[name]) for name in ("part", "case", "by", "piece") if row.get(name))
        rest = {name: value for name, value in row.items() if name not in ("part", "case", "by", "piece")}
        shown = ", ".join(f"{name} {readable(value)}" for name, value in rest.items() if value != "")
        print(f"[{time.monotonic() - began_at:5.0f} s] {words}: {shown}", file=sys.stderr, flush=True)

    return told
