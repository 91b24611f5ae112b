"""Lives of a simulated cluster, seed by seed: `python -m tests.sim --seeds 0:10000 --jobs 2`.

--seeds A:B        every seed from A to B - 1; a violation prints its seed and what did not hold
--replay SEED      one seed twice; says whether both went the same way
--mutants all      bugs on purpose: the first seed that finds each
--handoffs N       so many handoffs without tokens, with storms of cancels: blocks that hold somebody else's KV
"""

import argparse
import importlib
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

from tests.sim.mutants import ROWS, install

CHUNK = 100  # lives a process
WALK = 50_000  # handoffs a process
COUNTS = ("handoffs", "committed", "aborted", "died", "cancels", "blocks moved", "foreign blocks", "lost blocks")
HANGS_S = 60.0, 0.3  # a mutant whose process takes longer than this, and this a seed, hangs: a find too


def live(first: int, last: int, stop: bool) -> int:
    """Run seeds; prints each violation, then what was done. Returns how many violations there were."""
    world = importlib.import_module("engine.sim.world")  # late: a mutant is put in before
    bad = events = 0
    for seed in range(first, last):
        try:
            events += world.World(seed).run().events
        except Exception as error:  # whatever a bug raises is a find
            bad += 1
            print(f"seed {seed}: {type(error).__name__}: {str(error)[:300]}", flush=True)
            if stop:
                break
    print(f"did {last - first} {events} {bad}", flush=True)
    return bad


def spread(first: int, last: int, jobs: int) -> int:
    """Run seeds in `jobs` processes; returns the exit code."""
    began, totals = time.perf_counter(), [0, 0, 0]
    commands = [
        [sys.executable, "-m", "tests.sim", "--live", f"{start}:{min(start + CHUNK, last)}"]
        for start in range(first, last, CHUNK)
    ]
    with ThreadPoolExecutor(jobs) as pool:
        for done, lines in enumerate(pool.map(run, commands), 1):
            for line in lines[:-1]:
                print(line, flush=True)
            totals = [a + b for a, b in zip(totals, map(int, lines[-1].split()[1:]), strict=True)]
            if sys.stderr.isatty():
                print(f"\r{done * CHUNK} seeds", end="", file=sys.stderr)
    took = time.perf_counter() - began
    seeds, events, bad = totals
    print(f"{seeds} seeds, {bad} violations, {events} events, {took:.1f} s, {events / took:.0f} events/s")
    return 1 if bad else 0


def walk(wanted: int, jobs: int) -> int:
    """Hand `wanted` prompts on in `jobs` processes; 1 if a block was lost or held somebody else's KV."""
    began, totals = time.perf_counter(), Counter()
    starts = range(0, wanted, WALK)
    commands = [
        [sys.executable, "-m", "tests.sim.handoffs", str(start), str(min(WALK, wanted - start))] for start in starts
    ]
    with ThreadPoolExecutor(jobs) as pool:
        for lines in pool.map(run, commands):
            for name, count in (line.split("\t") for line in lines):
                totals[name] += int(count)
    took = time.perf_counter() - began
    said = ", ".join(f"{totals[name]} {name}" for name in COUNTS)
    print(f"{said}, {took:.1f} s, {totals['handoffs'] / took:.0f} handoffs/s")
    return 1 if totals["foreign blocks"] or totals["lost blocks"] else 0


def run(command: list[str], limit_s: float | None = None) -> list[str]:
    """The lines a process prints."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=limit_s)
    except subprocess.TimeoutExpired:
        return [f"hangs for {limit_s:.0f} s"]
    if not result.stdout.strip():
        raise RuntimeError(result.stderr[-2000:])
    return result.stdout.strip().splitlines()


def hunt(wanted: str, last: int, jobs: int) -> int:
    """The first seed that finds each mutant; 1 if one lives."""
    rows = [(number, row) for number, row in enumerate(ROWS) if wanted in ("all", str(number), row.name)]
    commands = [[sys.executable, "-m", "tests.sim", "--mutant", str(n), "--live", f"0:{last}"] for n, _ in rows]
    alive, limit_s = 0, HANGS_S[0] + HANGS_S[1] * last
    with ThreadPoolExecutor(jobs) as pool:
        for (number, row), lines in zip(rows, pool.map(lambda c: run(c, limit_s), commands), strict=True):
            killed = lines[0].startswith(("seed", "hangs"))
            alive += not killed
            print(f"{number:3} {row.name}: {lines[0][:140] if killed else f'LIVES after {last} seeds'}", flush=True)
    print(f"{len(rows)} mutants, {alive} alive")
    return 1 if alive else 0


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", default="0:1000", help="A:B")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--mutants", help="all, a number or a name")
    parser.add_argument("--replay", type=int, metavar="SEED")
    parser.add_argument("--handoffs", type=int, metavar="N")
    parser.add_argument("--live", help=argparse.SUPPRESS)
    parser.add_argument("--mutant", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.live is not None:
        if options.mutant is not None:
            install(ROWS[options.mutant])
        first, last = map(int, options.live.split(":"))
        return min(live(first, last, options.mutant is not None), 1)
    if options.handoffs is not None:
        return walk(options.handoffs, options.jobs)
    first, last = map(int, options.seeds.split(":"))
    if options.replay is not None:
        world = importlib.import_module("engine.sim.world")
        digests = [world.World(options.replay).run().digest for _ in range(2)]
        print(f"seed {options.replay}: {' '.join(digests)}")
        return int(digests[0] != digests[1])
    return hunt(options.mutants, last, options.jobs) if options.mutants else spread(first, last, options.jobs)


if __name__ == "__main__":
    sys.exit(main())
