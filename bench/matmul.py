"""Products with quantised weights on a CPU beside the plain float32 products of the same matrices.

    plain | int8 | plain | int8 dynamic | plain | ...   round and round -> ratio of each to the plain ones around it

A program multiplies the four matrices of a few layers, each product waiting for the one before, as a decoder does;
more layers than the caches hold, so that weights come from memory. Only ratios are reported: below 1 is faster.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from statistics import median

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bench.decode import MATRICES, shape_of
from bench.record import parser, record, show
from engine.models.project import Method, Weight, column_parallel
from engine.weights.drawn import random_weights
from pallas_kernels.quantised import quantise
from pallas_kernels.target import CPU
from sharding.mesh import MeshSpec, lane_meshes

KINDS = ("int8", "fp8", "int4")
RUN_S = 0.1  # how long one run of a program lasts, about


def products(matrices: list[Weight], mesh: Mesh, rows: int, dynamic: bool) -> Callable[[], None]:
    """A function that multiplies every matrix with `rows` rows, and waits."""
    how = Method("fast", CPU, dynamic)

    def local(matrices: list[Weight]) -> jax.Array:
        carried = jnp.float32(0)
        for w_DX in matrices:
            x_TD = carried + jnp.linspace(-1, 1, rows * w_DX.shape[0]).reshape(rows, -1)
            carried = 1e-9 * column_parallel(x_TD, w_DX, [], how)[0, 0]
        return carried

    specs = jax.tree.map(lambda array: array.sharding.spec, matrices)
    mapped = jax.shard_map(local, mesh=mesh, in_specs=(specs,), out_specs=PartitionSpec(), check_vma=False)
    run = jax.jit(mapped).lower(matrices).compile()
    return lambda: jax.block_until_ready(run(matrices))


def measure(plain: Callable[[], None], others: Mapping[str, Callable[[], None]], rounds: int) -> Iterator[dict]:
    """Each of `others` beside `plain`, which runs before and after it: medians and extremes of the ratios."""
    counts = {name: _count(run) for name, run in (("plain", plain), *others.items())}
    ratios: dict[str, list[float]] = {name: [] for name in others}
    for _ in range(rounds):
        before = _seconds(plain, counts["plain"])
        for name, run in others.items():
            took = _seconds(run, counts[name])
            after = _seconds(plain, counts["plain"])
            ratios[name].append(2 * took / (before + after))
            before = after
    for name, found in ratios.items():
        yield {"weights": name, "ratio": median(found), "ratio low": min(found), "ratio high": max(found)}


def _count(run: Callable[[], None]) -> int:
    """Calls that fill a run."""
    run()
    return max(int(RUN_S / _seconds(run, 1)), 1)


def _seconds(run: Callable[[], None], count: int) -> float:
    began = time.perf_counter()
    for _ in range(count):
        run()
    return (time.perf_counter() - began) / count


def main(arguments: list[str]) -> int:
    """Measure every kind, weight-only and dynamic, at every number of rows."""
    options = parser("matmul", __doc__)
    options.add_argument("--model", default="qwen3-0.6b", help="shapes; weights are random")
    options.add_argument("--layers", type=int, default=4)
    options.add_argument("--kinds", default=",".join(KINDS))
    options.add_argument("--rows", default="1,4,16")
    options.add_argument("--rounds", type=int, default=9)
    chosen = options.parse_args(arguments)
    jax.config.update("jax_platforms", "cpu")
    config = shape_of(chosen.model, chosen.layers)
    mesh = lane_meshes(MeshSpec(), config.heads, config.kv_heads)[0]
    weights = random_weights(config, mesh, np.dtype(np.float32))
    matrices = [np.asarray(layer[name]) for layer in weights["layers"] for name in MATRICES]
    matrices = jax.device_put(matrices, NamedSharding(mesh, PartitionSpec()))
    rounded = jax.jit(quantise, static_argnums=1)
    quantised = {kind: [rounded(w_DX, kind) for w_DX in matrices] for kind in chosen.kinds.split(",")}
    lines = []
    for rows in map(int, chosen.rows.split(",")):
        others = {
            f"{kind}{' dynamic' * dynamic}": products(held, mesh, rows, bool(dynamic))
            for kind, held in quantised.items()
            for dynamic in (0, 1)
        }
        about = {"model": chosen.model, "layers": config.num_layers, "rows": rows}
        plain = products(matrices, mesh, rows, False)
        lines += [about | figures for figures in measure(plain, others, chosen.rounds)]
    show("products with quantised weights, time over that of plain float32", lines)
    record("matmul", arguments).append(lines, chosen.out)
    return 0
