"""Loading an artifact of `serac convert` beside loading the folder of safetensors that it was made from.

    convert once -> (folder, artifact) | (artifact, folder) | ... in turns -> ratio of each pair, median and range

Both are read from the page cache after the first, checked as a server checks them, and placed on a mesh. An
artifact is hashed whole while it is read, so 1 is not expected.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import jax
import numpy as np

from bench.record import parser, record, show
from engine.models.config import from_hf
from engine.planning import weights_bytes
from engine.weights.convert import convert
from engine.weights.load import load
from engine.weights.source import ModelFolder, describe, resolve
from sharding.mesh import lane_meshes, parse_mesh


def main(arguments: list[str]) -> int:
    """Convert the model to a temporary folder and time both loads."""
    options = parser("load", __doc__)
    options.add_argument("--model", default="embedded", help="a folder of safetensors (default embedded)")
    options.add_argument("--meshes", default="1", help="sizes; XLA_FLAGS must offer as many devices (default 1)")
    options.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    options.add_argument("--pairs", type=int, default=20)
    chosen = options.parse_args(arguments)
    with artifact(resolve(chosen.model)) as (folder, stored):
        rows = [measure(folder, stored, mesh, chosen) for mesh in chosen.meshes.split(",")]
    show(f"loading {chosen.model} as {chosen.dtype}: artifact / safetensors", rows)
    record("load", arguments).append(rows, chosen.out)
    return 0


@contextmanager
def artifact(folder: ModelFolder) -> Iterator[tuple[ModelFolder, ModelFolder]]:
    """The folder and its artifact, which is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="serac-bench-") as home:
        out = Path(home) / "artifact"
        convert(folder, out)
        yield folder, describe(out, folder.name)


def measure(folder: ModelFolder, stored: ModelFolder, mesh: str, chosen: argparse.Namespace) -> dict[str, object]:
    """The row of one mesh: seconds of each and the ratio of pairs, taken in turns."""
    config, spec = from_hf(folder.config()), parse_mesh(mesh)
    lane = lane_meshes(spec, config.heads, config.kv_heads)[0]
    dtype = np.dtype(jax.numpy.dtype(chosen.dtype))

    def seconds(model: ModelFolder) -> float:
        began = time.perf_counter()
        jax.block_until_ready(load(model, config, lane, dtype))
        return time.perf_counter() - began

    for model in (folder, stored):
        seconds(model)
    pairs = []
    for turn in range(chosen.pairs):
        order = (folder, stored) if turn % 2 else (stored, folder)
        took = {id(model): seconds(model) for model in order}
        pairs.append((took[id(folder)], took[id(stored)]))
    ratios = sorted(theirs / ours for ours, theirs in pairs)
    return {
        "mesh": str(spec),
        "MB on all devices": weights_bytes(config, spec.tp, dtype.itemsize) * spec.tp / 1e6,
        "safetensors ms": median(ours for ours, _ in pairs) * 1e3,
        "artifact ms": median(theirs for _, theirs in pairs) * 1e3,
        "ratio": median(ratios),
        "ratio low": ratios[len(ratios) // 10],
        "ratio high": ratios[-1 - len(ratios) // 10],
    }
