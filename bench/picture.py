"""The rows of `python -m bench mesh` as a picture: what one device holds and sends, and how long a step takes.

Actual figures are bars, planned ones marks on them. Without matplotlib there is no picture, and a line says so.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

MIB = 1 << 20
PARTS = ("weights", "kv", "state", "temporaries")


def draw(rows: Sequence[Mapping], file: Path) -> None:
    """Three panels over the meshes, written to `file`."""
    try:
        import matplotlib
    except ImportError:
        print("no picture: pip install 'serac[bench]' brings matplotlib", file=sys.stderr)
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (held, sent, took) = pyplot.subplots(1, 3, figsize=(12, 3.6), constrained_layout=True)
    meshes = [row["mesh"] for row in rows]
    bottom = [0.0] * len(rows)
    for part in PARTS:
        sizes = [row["memory"][part]["actual"] / MIB for row in rows]
        held.bar(meshes, sizes, bottom=bottom, label=part, width=0.6)
        bottom = [under + size for under, size in zip(bottom, sizes, strict=True)]
    planned = [sum(row["memory"][part]["planned"] for part in PARTS) / MIB for row in rows]
    held.plot(meshes, planned, "k_", markersize=24, label="planned")
    held.set(title="memory of one device", ylabel="MiB")
    for kind, offset in (("plain", -0.2), ("full", 0.2)):
        programs = [_decode(row, kind) for row in rows]
        places = [place + offset for place in range(len(rows))]
        sent.bar(places, [_kib(p, "actual") for p in programs], width=0.36, label=f"{kind} draw")
        marks = [_kib(p, "planned") for p in programs]
        sent.plot(places, marks, "k_", markersize=16, label="planned" if kind == "full" else None)
    sent.set(
        title="collectives of a decode step", ylabel="KiB a token", xticks=range(len(rows)), xticklabels=meshes
    )
    took.bar(meshes, [row["decode step ms"] for row in rows], width=0.6, color="gray")
    took.set(title="decode step on this machine", ylabel="ms")
    held.legend(fontsize="small")
    sent.legend(fontsize="small")
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def _decode(row: Mapping, kind: str) -> Mapping:
    """The largest program of a kind that decodes; if none was compiled, of those that do more."""
    programs = [p for p in row["programs"] if p["program"].endswith(kind)]
    decodes = [p for p in programs if p["program"].startswith("decode")]
    return max(decodes or programs, key=lambda p: p["tokens"])


def _kib(program: Mapping, which: str) -> float:
    return sum(sent["bytes"] for sent in program[which].values()) / program["tokens"] / 1024
