"""Attention on a CPU: the work list beside gathering everything, in interleaved pairs of runs.

    gather, gather, .. | list, list, .. | gather, .. | list, .. | ...  ->  median of the neighbours' ratios

A run calls one of them again and again, as steps follow each other in serving: a call right after the other's pays
for what that left in caches and allocator.

Both decode one token a row over scattered blocks of a pool. Gathering everything takes every block of every row's
table and one softmax over all of it, whatever the lengths are: the plain way to write paged attention in XLA. Full
batches show what tiles that stay in the cache save, ragged ones what is never read.
"""

import functools
import time
from collections.abc import Callable
from statistics import median

import jax
import jax.numpy as jnp
import numpy as np

from bench.record import parser, record, show
from pallas_kernels.dispatch import attention
from pallas_kernels.pools import Pool, keys_at, values_at
from pallas_kernels.rows import Rows

N, K, H, C = 32, 8, 128, 16
COLUMNS = 128  # 2,048 positions
SCENES = {"full": [2048] * 8, "ragged": [2048, 100, 50, 300, 17, 64, 500, 1]}
AIMS = {"full": 3, "ragged": 10}
CALLS = 8  # of a run


@jax.jit
def gather_everything(q_BNH: jax.Array, k: Pool, v: Pool, rows: Rows) -> jax.Array:
    """[B, N, H]: one softmax a row over all blocks of its table."""
    blocks_X = rows.table_BM.reshape(-1)
    B, N, H = q_BNH.shape
    k_BMKCH, v_BMKCH = (
        x.astype(jnp.float32).reshape(B, -1, K, C, H) for x in (keys_at(k, blocks_X), values_at(v, blocks_X))
    )
    q_BKGH = q_BNH.astype(jnp.float32).reshape(B, K, N // K, H) * H**-0.5
    scores = jnp.einsum("BKGH,BMKCH->BKGMC", q_BKGH, k_BMKCH)
    position_MC = jnp.arange(scores.shape[3] * C).reshape(-1, C)
    scores = jnp.where(position_MC <= rows.start_B[:, None, None, None, None], scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=(-2, -1))
    return jnp.einsum("BKGMC,BMKCH->BKGH", weights, v_BMKCH).reshape(B, N, H)


def work_list(q_BNH: jax.Array, k: Pool, v: Pool, rows: Rows) -> jax.Array:
    """[B, N, H] as the dispatcher serves it."""
    options = {"base": 0, "scale": H**-0.5, "window": None, "numerics": "fast", "one_token": True}
    return attention(q_BNH, k, v, rows, **options)


def scene(lengths: list[int], dtype: str) -> tuple[jax.Array, Pool, Pool, Rows]:
    """Queries, pools and rows of one decode step over scattered blocks."""
    rng = np.random.default_rng(0)
    B = len(lengths)
    q_BNH = rng.normal(size=(B, N, H)).astype(np.float32)
    k, v = (rng.normal(size=(B * COLUMNS, K, C, H)).astype(np.float32) for _ in "kv")
    if dtype == "bfloat16":  # as CPUs hold it
        k, v = (np.asarray(jnp.asarray(x, jnp.bfloat16)).view(np.uint16) for x in (k, v))
    table_BM = rng.permutation(B * COLUMNS).reshape(B, COLUMNS).astype(np.int32)
    start_B = np.array(lengths, np.int32) - 1
    rows = Rows(np.arange(B, dtype=np.int32), start_B, np.ones(B, np.int32), table_BM)
    return jax.tree.map(jnp.asarray, (q_BNH, k, v, rows))


def pairs(first: Callable[[], object], second: Callable[[], object], count: int) -> dict[str, float]:
    """Runs of both in turn, `count` times; the median of the seconds of a call of the first over the second's."""
    both = [[mean_s(call) for call in (first, second)] for _ in range(count)]
    return {
        "gather ms": 1e3 * median(times[0] for times in both),
        "list ms": 1e3 * median(times[1] for times in both),
        "ratio": median(times[0] / times[1] for times in both),
    }


def mean_s(call: Callable[[], object]) -> float:
    """Seconds of one of CALLS calls."""
    began = time.perf_counter()
    for _ in range(CALLS):
        call()
    return (time.perf_counter() - began) / CALLS


def main(arguments: list[str]) -> int:
    """Print one row a scene and dtype."""
    lines = parser("attention", __doc__)
    lines.add_argument("--pairs", type=int, default=15, help="pairs of runs (default 15)")
    options = lines.parse_args(arguments)
    jax.config.update("jax_platforms", "cpu")
    rows = []
    for dtype in ("float32", "bfloat16"):
        for name, lengths in SCENES.items():
            arrays = scene(lengths, dtype)
            plain, listed = (functools.partial(run, *arrays) for run in (gather_everything, jax.jit(work_list)))
            off = float(jnp.max(jnp.abs(plain() - listed())))  # compiles both
            waits = [lambda run=run: run().block_until_ready() for run in (plain, listed)]
            figures = pairs(*waits, options.pairs)
            rows.append({"batch": name, "positions": sum(lengths), "pool": dtype, **figures, "aim": AIMS[name]})
            rows[-1]["largest difference"] = off
    show("one layer of 32 query and 8 kv heads of 128, 8 rows", rows)
    record("attention", arguments).append(rows, options.out)
    return 0
