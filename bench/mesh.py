"""A lane over mesh sizes, one row each: speed, collectives, programs, memory beside the plan, equal tokens.

    --meshes 1,2,4,8 -> a process a mesh with as many virtual devices (bench/mesh_lane.py) -> table, lines, picture

JAX takes its devices once, when it starts; so each mesh has a process of its own and one command makes all rows. Of
several lanes one is measured.
On virtual devices of one CPU the speeds say what a mesh costs there and nothing of what it would gain on many
processors; collectives, bytes, programs and tokens are what they would be.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from bench.mesh_lane import add_options
from bench.picture import draw
from bench.record import parser, record, show
from engine.environment import needed
from engine.errors import SeracError

Row = dict[str, object]


def main(arguments: list[str]) -> int:
    """Measure every mesh; 0 when all could be."""
    options = parser("mesh", __doc__)
    options.add_argument("--meshes", default="1,2,4,8", help="sizes, one row each (default 1,2,4,8)")
    options.add_argument("--picture", type=Path, metavar="FILE.png", help="draw the rows")
    options.add_argument("--device", default="auto", choices=("auto", "cpu", "gpu"))
    add_options(options)
    chosen = options.parse_args(arguments)
    handed = {k: v for k, v in vars(chosen).items() if k not in ("meshes", "picture", "device", "out")}
    rows: list[Row] = []
    for mesh in chosen.meshes.split(","):
        print(f"mesh {mesh} ...", file=sys.stderr, flush=True)
        rows.append(measure(mesh, chosen.device, words(handed)))
    compare(rows)
    show(f"{chosen.model} over meshes, {chosen.numerics}", [short(row) for row in rows])
    show("\nmemory of one device, bytes", [line for row in rows for line in memory(row)])
    record("mesh", arguments).append(rows, chosen.out)
    if chosen.picture is not None:
        draw(rows, chosen.picture)
    return 0


def words(handed: Mapping[str, object]) -> list[str]:
    """Options as a command line."""
    line: list[str] = []
    for name, value in handed.items():
        if value is True:
            line.append(f"--{name}")
        elif value is not False and value is not None:
            line += [f"--{name}", str(value)]
    return line


def measure(mesh: str, device: str, handed: Sequence[str]) -> Row:
    """The row of one mesh, from a process of its own. Raises SeracError with what the process said last."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment |= needed(device, mesh, environment)
    command = [sys.executable, "-m", "bench.mesh_lane", "--mesh", mesh, *handed]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = (done.stderr.strip() or "nothing").splitlines()[-1]
        raise SeracError(f"mesh {mesh}: its process ended with code {done.returncode}, saying {said}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(rows: Sequence[Row]) -> None:
    """Says in each row how many sequences drew the tokens of the first row; the tokens themselves are dropped."""
    first = rows[0]["tokens"]
    for row in rows:
        tokens = row.pop("tokens")
        same = sum(mine == others for mine, others in zip(tokens, first, strict=True))
        row["equal sequences"] = f"{same}/{len(first)}"


def short(row: Row) -> Row:
    """What the table shows of a row: the largest plain decode and the largest full step stand for all programs."""
    decode = max((p for p in row["programs"] if "decode" in p["program"] and "plain" in p["program"]), key=_tokens)
    full = max((p for p in row["programs"] if "full" in p["program"]), key=_tokens)
    names = ("mesh", "axes", "prefill tokens/s", "decode tokens/s", "decode step ms")
    return {
        **{name: row[name] for name in names},
        "collectives a decode step": _calls(decode["actual"]),
        "bytes a token": _bytes(decode["actual"]) / decode["tokens"],
        "full step": _calls(full["actual"]),
        "bytes a token, full": _bytes(full["actual"]) / full["tokens"],
        "as planned": row["collectives as planned"],
        "executables": row["executables"],
        "compile s": row["compile s"],
        "equal sequences": row["equal sequences"],
    }


def memory(row: Row) -> list[Row]:
    """Bytes beside the plan, a line a part."""
    return [
        {"mesh": row["mesh"], "part": part, **sizes, "actual / planned": sizes["actual"] / max(sizes["planned"], 1)}
        for part, sizes in row["memory"].items()
    ]


def _tokens(program: Mapping) -> int:
    return program["tokens"]


def _calls(kinds: Mapping[str, Mapping[str, int]]) -> str:
    return ", ".join(f"{sent['calls']} {kind}" for kind, sent in kinds.items()) or "none"


def _bytes(kinds: Mapping[str, Mapping[str, int]]) -> int:
    return sum(sent["bytes"] for sent in kinds.values())
