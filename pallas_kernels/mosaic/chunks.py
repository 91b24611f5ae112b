"""Attention of rows with any number of tokens, as one kernel for Hopper: tensor cores fed by TMA.

A block of threads is a producer (`chunk_items`), which copies tiles of s positions into shared memory, and two
consumers (`chunk_softmax`) of 64 rows each, which take turns on the tensor cores: one multiplies while the other
does its softmax.

    producer     K0 V0 K1 V1 ..    into a ring of stages, each tile as soon as both consumers left its place
    consumer 0   QK0 softmax QK1 PV0 softmax QK2 PV1 ..
    consumer 1       QK0 softmax QK1 PV0 softmax QK2 PV1 ..

The rows of a tile are `heads` query heads of one kv head times 128 // heads tokens, so short rows fill tiles and
keys are read once for all those heads. Queries are read where they are, and outputs written where they belong:
no copy of either in another order is made. A row's last tile writes token by token, not to touch its neighbour.

    heads 8    consumer 0: heads 0..3 x 16 tokens     consumer 1: heads 4..7 x the same tokens
    heads 1    consumer 0: tokens 0..63               consumer 1: tokens 64..127

One block runs on each multiprocessor and takes every so many places of the work list (`tiles`), so the producer
fetches the next item's keys while the consumers write the last one's outputs.

Bits: tiles of positions stand at multiples of s and are met in order, and a tile that a token cannot see adds
exactly nothing to its sums. With `ordered` every tile takes the same instructions (else those that are seen whole
skip the mask), so the bits of a token depend on the positions before it and on s alone.
Cost: 4 H s operations for each row and tile; keys and values once for each query tile. Registers: 232 of a
consumer's thread and 40 of the producer's are the 3 x 168 that a block starts with; 240 would wait for ever.
Source: FlashAttention-3, made ragged and for blocks.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic.chunk_items import Refs, Sizes, out_width, produce, shared_memory
from pallas_kernels.mosaic.chunk_softmax import LOG2_E, consume
from pallas_kernels.mosaic.memory import ROWS
from pallas_kernels.mosaic.tiles import BOX, list_tiles, places
from pallas_kernels.pools import Pool, Scaled
from pallas_kernels.rows import Rows
from pallas_kernels.shape import Shape
from pallas_kernels.target import H200, Target

OLD = jax.__version_info__ < (0, 11)
HEAD_WIDTHS = (64, 80, 96, 112, 128, 192, 256)
SHARED_BYTES = 232448 - 4096  # of a Hopper multiprocessor, less what barriers and reductions may take


class Config(NamedTuple):
    """What may be tuned; every value gives the same attention."""

    tile: int  # positions
    stages: int
    heads: int  # query heads of a tile, a power of two
    ordered: bool = False  # one path for all tiles, so that bits do not depend on what shares the tile


def unserved(target: Target, shape: Shape) -> str | None:
    """Why this kernel cannot serve `shape`, in words."""
    if target.platform != "cuda" or target.arch != 90:
        return "it is for compute capability 9.0"
    if shape.dtype not in ("bfloat16", "float16"):
        return f"queries of {shape.dtype} would be rounded"
    if shape.pool_dtype != shape.dtype:
        return f"pools of {shape.pool_dtype} would have to become {shape.dtype} on their way to the tensor cores"
    if shape.head_width not in HEAD_WIDTHS:
        return f"head width {shape.head_width} is not one of {HEAD_WIDTHS}"
    if shape.block % ROWS and ROWS % shape.block or shape.block < 8:
        return f"blocks of {shape.block} positions do not fit tiles of {ROWS}"
    return None


def rule(shape: Shape, tokens: int, rows: int, ordered: bool = False) -> Config:
    """What to use where nothing was tuned, for steps of so many tokens in so many rows.

    Long rows fill tiles of any heads, so the query heads are dealt without rest; short ones want all in a tile.
    """
    H = shape.head_width
    narrow = ordered or H > 128 or (shape.block % 128 and 128 % shape.block)
    narrow = narrow or (OLD and shape.block < 64)  # jax 0.10 spills 8 bytes when many copies make a tile
    tile = 64 if narrow else 128
    free_bytes = SHARED_BYTES - 2 * ROWS * 2 * (H + out_width(H))  # less queries and outputs
    stages = min(4, free_bytes // (4 * tile * H))
    whole = next(heads for heads in (16, 8, 4, 2, 1) if shape.group % heads == 0)
    packed = next((heads for heads in (1, 2, 4, 8) if heads >= shape.group), 16)
    long = tokens > 16 * rows and 8 * shape.group < 7 * packed
    return Config(tile, stages, whole if long else packed, ordered)


def attend(
    q_TNH: jax.Array,
    k: Pool,
    v: Pool,
    rows: Rows,
    *,
    base: int | jax.Array,
    scale: float,
    window: int | None,
    soft_cap: float | None = None,
    sinks_N: jax.Array | None = None,
    target: Target = H200,
    config: Config | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Each token of a row sees the last `window` (or all) of the row's positions up to its own.

    Returns [T, N, H] in q's dtype and the log of the mass [T, N], float32; what stands in the places of tokens that
    belong to no row is undefined. Rows with count 0 are skipped.
    Raises ValueError for what `unserved` names.
    """
    T, N, H = q_TNH.shape
    pool = k.numbers if isinstance(k, Scaled) else k
    _, K, C, _ = pool.shape
    shape = Shape(N // K, H, C, q_TNH.dtype.name, pool.dtype.name)
    if (reason := unserved(target, shape)) is not None:
        raise ValueError(reason)
    B, M = rows.table_BM.shape
    config = config or rule(shape, T, B)
    t = 2 * ROWS // config.heads
    parts = -(-shape.group // config.heads)
    q_TNH = jnp.pad(q_TNH, ((0, max(t - T, -T % BOX)), (0, 0), (0, 0)))
    tiles = list_tiles(rows, len(q_TNH), t, config.tile, window)
    blocks = min(target.cores, len(tiles.token) * K * parts)
    sizes = Sizes(*config, K, shape.group, H, C, M, parts, blocks, scale, window, soft_cap, sinks_N is not None)
    inputs = (q_TNH, k, v, rows.table_BM, tiles.packed(), tiles.total, jnp.asarray(base, jnp.int32).reshape(1))
    o_TNH, lse = launch(sizes, *inputs, spread(sinks_N, sizes))
    tile_T, place_T = places(rows, tiles, T, t)
    lse_WNt = lse.reshape(-1, K, parts * config.heads, t)[:, :, : shape.group].reshape(-1, N, t)
    return o_TNH[:T], lse_WNt[tile_T, :, place_T]


def spread(sinks_N: jax.Array | None, sizes: Sizes) -> jax.Array:
    """The sink of each row of each consumer, in units of log 2: [K * parts, 2, 64]."""
    K, parts, heads = sizes.K, sizes.parts, sizes.heads
    if sinks_N is None:
        return jnp.zeros((K * parts, 2, ROWS), jnp.float32)
    sinks_KG = sinks_N.astype(jnp.float32).reshape(K, sizes.G) * LOG2_E
    sinks_KG = jnp.pad(sinks_KG, ((0, 0), (0, parts * heads - sizes.G)))
    return jnp.repeat(sinks_KG, 2 * ROWS // heads, axis=1).reshape(K * parts, 2, ROWS)


def launch(sizes: Sizes, *inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Compile and call the kernel: outputs as q_TNH, and masses of each row of each tile [W, K * parts, 2, 64]."""
    q_TNH, tiles = inputs[0], inputs[4]
    lse = jax.ShapeDtypeStruct((len(tiles), sizes.K * sizes.parts, 2, ROWS), jnp.float32)
    kernel = plgpu.kernel(
        functools.partial(work, sizes=sizes),
        out_type=[jax.ShapeDtypeStruct(q_TNH.shape, q_TNH.dtype), lse],
        scratch_types=shared_memory(sizes, q_TNH.dtype),
        grid=(sizes.blocks,),
        grid_names=("block",),
        num_threads=3,
        thread_name="group",
        kernel_name="mosaic_chunks",
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
    )
    return kernel(*inputs)


def work(*refs: jax.Array, sizes: Sizes) -> None:
    """One block of threads; groups 0 and 1 consume, group 2 produces."""
    group = lax.axis_index("group")
    pl.when(group < 2)(lambda: consume(Refs(*refs), sizes, group))
    pl.when(group == 2)(lambda: produce(Refs(*refs), sizes))
