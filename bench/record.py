"""What stands beside every figure: the machine, the versions, the commit and the command that made it.

    Record(bench, command) + rows of figures --lines--> one JSON object a row --append--> FILE.jsonl
                                     --show--> a table in the terminal

A line names no host, user or path. `kind` tells measured figures from computed ones; they never share a series.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from engine.tables import show_table

SCHEMA = 1
PACKAGES = ("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "numpy", "flax", "orbax-checkpoint")
ROOT = Path(__file__).parent.parent
CPUINFO, MEMINFO = Path("/proc/cpuinfo"), Path("/proc/meminfo")
PLACES = ("--out", "--picture")  # options that name files
Kind = Literal["measured", "computed"]
Row = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Record:
    """The bench that speaks and how it was called."""

    bench: str
    command: str
    kind: Kind = "measured"

    def lines(self, rows: Sequence[Row]) -> list[str]:
        """One JSON object a row, each whole by itself."""
        facts = {
            "schema": SCHEMA,
            "bench": self.bench,
            "kind": self.kind,
            "when": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": self.command,
            **commit(),
            "machine": machine() | gpu(),
            "versions": versions(),
        }
        return [json.dumps({**facts, "figures": dict(row)}) for row in rows]

    def append(self, rows: Sequence[Row], file: Path | None) -> None:
        """Add the rows to the end of `file`, if one is given."""
        if file is not None:
            with file.open("a", encoding="utf-8") as out:
                out.writelines(line + "\n" for line in self.lines(rows))


def show(title: str, rows: Sequence[Row]) -> None:
    """A table on the terminal; lists and mappings are for programs and left out."""
    kept = [{k: v for k, v in row.items() if not isinstance(v, (list, Mapping))} for row in rows]
    show_table(title, kept, sys.stdout)


def parser(name: str, words: str | None) -> argparse.ArgumentParser:
    """The options every bench has."""
    lines = argparse.ArgumentParser(prog=f"python -m bench {name}", description=(words or "").partition("\n")[0])
    lines.add_argument("--out", type=Path, metavar="FILE.jsonl", help="append the figures, one JSON line a row")
    return lines


def record(name: str, arguments: Sequence[str], kind: Kind = "measured") -> Record:
    """The record of a bench called with `arguments`; where its figures went is left out."""
    kept, skip = [], False
    for word in arguments:
        option, _, value = word.partition("=")
        if not skip and option not in PLACES:
            kept.append(word)
        skip = option in PLACES and not value
    return Record(name, " ".join(["python -m bench", name, *kept]), kind)


def machine() -> dict[str, object]:
    """Processor, cores this process may use, and memory."""
    return {
        "cpu": _field(CPUINFO, "model name") or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": int((_field(MEMINFO, "MemTotal") or "0").split()[0]) * 1024 or None,
        "system": platform.system(),
    }


def gpu() -> dict[str, str]:
    """The first GPU and its driver, where NVIDIA's tool is at hand."""
    if (tool := shutil.which("nvidia-smi")) is None:
        return {}
    query = [tool, "--query-gpu=name,driver_version,power.limit,clocks.max.sm", "--format=csv,noheader"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    values = [value.strip() for value in said.partition("\n")[0].split(",")]
    return dict(zip(("gpu", "driver", "power limit", "highest clock"), values, strict=False))


def versions() -> dict[str, str]:
    """Of Python and of what the figures depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> dict[str, object]:
    """The commit of the code and whether files differ from it; empty outside a checkout."""
    if not (ROOT / ".git").exists():  # installed; a repository around it would be another's
        return {}
    try:
        head = _git("rev-parse", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return {}
    return {"commit": head, "dirty": bool(changed)}


def _git(*words: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _field(path: Path, name: str) -> str | None:
    """The value of the first `name : value` line of a file of the kernel's."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), None)
