"""Every served shape and a whole split step compiled for GPUs that are not there: registers, memory, launches.

    pallas_kernels/served.py + bench/ahead_step.py --two processes (ahead_compile.py)--> a line each, as they come
                                                   --write--> RECORDED, which the tests compare

The whole compiler of an NVIDIA GPU is in the packages of PACKAGES; no driver, no toolkit. Figures are of one
compiler: they stand under the version of jax, with the versions of the assembler beside them.
A kernel that cannot be compiled for its target ends the process: the row it was at is named, the others go on.

Cost: about 3 minutes for all rows on two cores.
"""

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TextIO

from bench import ahead_step
from bench.ahead_compile import WORD
from pallas_kernels import served

PACKAGES = {  # and their versions, None for that of jax
    "jax-cuda13-plugin": None,
    "jax-cuda13-pjrt": None,
    "nvidia-cuda-nvcc": "13.5.37",
    "nvidia-nvvm": "13.5.37",
}
ROOT = Path(__file__).parents[1]
RECORDED = ROOT / "tests/pallas_kernels/compiled.json"
REFRESH = "python -m bench ahead --write"
WORKERS = 2
EQUAL = ("registers", "spill_bytes", "shared_bytes")  # of a kernel and its record
NO_LESS = ("wgmma", "mma", "tma")
MORE = 1.1  # times the temporaries that are recorded, at most
STEPS = tuple(step.name for step in ahead_step.STEPS)
Row = dict[str, object]


def main(arguments: list[str]) -> int:
    """Compile and print; 0 when every row compiled and no kernel spills."""
    options = argparse.ArgumentParser(prog="python -m bench ahead", description=(__doc__ or "").partition("\n")[0])
    options.add_argument("--target", choices=sorted(served.TARGETS), help="rows of this device alone")
    options.add_argument("--only", default="", metavar="WORDS", help="rows whose name holds these words")
    options.add_argument("--write", action="store_true", help=f"record the figures in {RECORDED.relative_to(ROOT)}")
    chosen = options.parse_args(arguments)
    missing = [name for name in PACKAGES if installed(name) is None]
    if missing:
        command = " ".join(["pip install --no-deps", *pinned(importlib.metadata.version("jax"))])
        print(f"bench ahead: not installed: {', '.join(missing)}; {command}", file=sys.stderr)
        return 2
    rows = [row.name for row in served.SERVED if chosen.target in (None, row.target)]
    steps = [name for name in STEPS if chosen.target in (None, "h200")]
    names = [name for name in rows + steps if chosen.only in name]
    found = compile_all(sys.executable, names, told=lambda row: print(line(row), flush=True))
    if chosen.write:
        record(found)
    return int(any("error" in row or spills(row) for row in found.values()))


def installed(package: str) -> str | None:
    """Its version here, if any."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def pinned(jax_version: str) -> list[str]:
    """PACKAGES as pip's requirements; to be installed without what they depend on."""
    return [f"{name}=={pin or jax_version}" for name, pin in PACKAGES.items()]


def compile_all(
    python: str,
    names: Sequence[str],
    told: Callable[[Row], None] = lambda row: None,
    timeout_s: float = 1800,
    workers: int = WORKERS,
) -> dict[str, Row]:
    """The figures of each name, compiled by processes of `python`; one that ended its process holds an `error`."""
    shares = [names[worker::workers] for worker in range(workers)]

    def work(share: Sequence[str]) -> list[Row]:
        rows = []
        for row in compile_share(python, share, timeout_s):
            told(row)
            rows.append(row)
        return rows

    with ThreadPoolExecutor(workers) as pool:
        found = {row.pop("name"): row for rows in list(pool.map(work, shares)) for row in rows}
    return {name: found[name] for name in names}


def compile_share(python: str, names: Sequence[str], timeout_s: float) -> Iterator[Row]:
    """Rows as they come; after a row that ends its process another process goes on."""
    left = list(names)
    while left:
        begun, began_at = left[0], time.monotonic()
        with tempfile.TemporaryFile("w+", errors="replace") as errors:
            for row in lines_of(python, left, errors, timeout_s):
                begun = str(row["name"])
                if "began" not in row:
                    left.remove(begun)
                    yield row
            if left:
                lost = begun if begun in left else left[0]
                left.remove(lost)
                errors.seek(0)
                late = time.monotonic() - began_at > timeout_s
                said = f"not done after {timeout_s} s" if late else telling(errors.read().splitlines())
                yield {"name": lost, "error": said}


def telling(said: Sequence[str]) -> str:
    """The line that says why a process ended."""
    said = [words for words in said if words.strip()] or ["it said nothing"]
    wanted = [words for words in said if "ERROR" in words or "Error" in words]
    return (wanted or said)[-1][-500:]


def lines_of(python: str, names: Sequence[str], errors: TextIO, timeout_s: float) -> Iterator[Row]:
    """What one process tells, line by line."""
    environment = dict(os.environ, JAX_PLATFORMS="cpu", PYTHONPATH=str(ROOT))
    command = [python, "-W", "ignore", "-m", "bench.ahead_compile", *names]
    pipes = {"stdout": subprocess.PIPE, "stderr": errors, "text": True}
    process = subprocess.Popen(command, env=environment, cwd=ROOT, **pipes)
    late = threading.Timer(timeout_s, process.kill)
    late.start()
    try:
        with process:
            for words in process.stdout or ():
                if words.startswith(WORD):
                    yield json.loads(words.removeprefix(WORD))
    finally:
        late.cancel()
        process.kill()


def spills(row: Row) -> int:
    """Bytes that the row's kernels spill."""
    return sum(kernel["spill_bytes"] for kernel in row.get("kernels", {}).values())


def differences(found: Mapping[str, Row], recorded: Mapping[str, Row]) -> list[str]:
    """Where `found` is not as recorded: registers, spills and shared memory equal, tensor cores and TMA no less."""
    lines = [f"{name}: recorded, but no row is called so" for name in recorded.keys() - found.keys()]
    for name, row in found.items():
        old = recorded.get(name, {})
        if "error" in row or "kernels" not in old:
            lines.append(f"{name}: {row.get('error', 'not recorded')}")
            continue
        if row["kernels"].keys() != old["kernels"].keys():
            lines.append(f"{name}: kernels {sorted(row['kernels'])}, recorded {sorted(old['kernels'])}")
            continue
        for kernel, now in row["kernels"].items():
            then = old["kernels"][kernel]
            off = [what for what in EQUAL if now[what] != then[what]]
            off += [what for what in NO_LESS if now[what] < then[what]]
            lines += [f"{name}: {kernel}: {what} {now[what]}, recorded {then[what]}" for what in off]
        if row["temp_bytes"] > MORE * old["temp_bytes"]:
            lines.append(f"{name}: {row['temp_bytes']} bytes of temporaries, recorded {old['temp_bytes']}")
    return lines


def line(row: Row) -> str:
    """A row of the table."""
    if "error" in row:
        return f"{row['name']:<42} FAILED {row['error']}"
    kernels = [kernel_words(name, each) for name, each in row["kernels"].items()] or ["no kernel"]
    facts = f"{row['launches']:>4} launches, {row['host_calls']:>3} calls {row['temp_bytes'] / 2**20:7.1f} MiB"
    seconds = f"{row['lower_s']:5.1f} + {row['compile_s']:.1f} s"
    if "serialise_s" in row:
        kernels.append(f"executable of {row['executable_bytes']} bytes written in {row['serialise_s']} s")
    return f"{row['name']:<42} {facts} {seconds}; {'; '.join(kernels)}"


def kernel_words(name: str, kernel: Mapping) -> str:
    """One kernel of a row."""
    counts = [f"{kernel[what]} {what}" for what in ("wgmma", "mma", "tma") if kernel[what]]
    shared = "?" if kernel["shared_bytes"] is None else kernel["shared_bytes"]
    sizes = [f"{kernel['registers']} registers", f"{kernel['spill_bytes']} spilled", f"{shared} shared"]
    return f"{name}: {', '.join(sizes + counts + kernel['warnings'])}"


def record(found: Mapping[str, Row]) -> None:
    """Put the figures of what compiled in RECORDED, under this version of jax; what it holds of others stays."""
    whole = json.loads(RECORDED.read_text()) if RECORDED.exists() else {}
    timed = ("lower_s", "compile_s", "serialise_s")
    good = {name: row for name, row in found.items() if "error" not in row}
    kept = {name: {key: value for key, value in row.items() if key not in timed} for name, row in good.items()}
    mine = whole.setdefault(importlib.metadata.version("jax"), {"packages": {}, "rows": {}})
    mine["packages"] = {name: installed(name) for name in PACKAGES}
    mine["rows"] |= kept
    known = {row.name for row in served.SERVED} | set(STEPS)
    mine["rows"] = {name: mine["rows"][name] for name in mine["rows"] if name in known}
    RECORDED.write_text(json.dumps(dict(sorted(whole.items())), indent=1) + "\n")
