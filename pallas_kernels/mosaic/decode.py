"""Attention of rows with one token each, as a kernel for Hopper: heads are the narrow side of both products.

As many programs as the device holds at once share out all rows' tiles evenly (`work`), for each kv head. A program
is two warpgroups, a producer that keeps a ring of stages filled and a consumer that empties it, and goes on from
one item, a stretch of one row's tiles, to the next without letting the ring run dry:

    items      a a a a|b b|c c c c          a program's share of the list
    producer   K0 V0 K1 V1 K2 V2 ..         waits for a free place; looks up a tile's blocks while it waits
    consumer   QK0 softmax VP0 QK1 ..       after an item's last tile writes its total, top and mass

`merge` then joins the items of a row. There is one consumer, not two that take turns: another program on the same
multiprocessor fills its pauses as well, needs no merging in shared memory and no even number of stages.

Table entries past a row's end are not followed: block 0 is read in their place, and masked. A pool may have any
number of elements: a copy names its block and head by a number of their own, which the hardware multiplies out.
Cost: keys and values once; a copy of the queries where a group neither fits nor fills boxes of 8; for each item and
kv head (H + 2) x g float32, written and read back. Compiled ahead of time for an H200 it takes 64 to 147 registers,
75 to 184 with 8-bit pools, and spills none. Up to 128 registers and 113 KiB two programs share a multiprocessor,
and one can wait for memory while the other computes.
Source: FlashDecoding; FlashMLA's and Stream-K's even shares.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic.decode_program import program
from pallas_kernels.mosaic.decode_tiles import Sizes, shared_memory
from pallas_kernels.mosaic.merge import merge
from pallas_kernels.pools import Pool, Scaled, geometry
from pallas_kernels.shape import Shape
from pallas_kernels.target import H200, Target
from pallas_kernels.work import TILE, Work, deal

SHARED_BYTES = 233472  # of a multiprocessor
RESERVED_BYTES = 1024 + 2048 + 1024  # of a program, for the system, reductions and barriers
MOST_GROUP = 32
MOST_FOR_TWO = {"float8_e4m3fn": 8 * 128}  # heads x head width up to which a thread takes at most 128 registers


class Config(NamedTuple):
    """What may be tuned; every value gives the same attention."""

    stages: int  # tiles of keys and values that a program holds
    resident: int  # programs on a multiprocessor
    fixed: int | None = None  # tiles of an item: what a row gives then does not depend on its batch


def rule(target: Target, shape: Shape) -> Config:
    """Two programs a multiprocessor where shared memory holds at least two stages of each, and registers both."""
    itemsize = jnp.dtype(shape.pool_dtype).itemsize
    g = -(-shape.group // 8) * 8
    stage = 2 * TILE * (shape.head_width * itemsize + (4 if itemsize == 1 else 0))
    held = 2 * g * (2 * shape.head_width + TILE) + RESERVED_BYTES
    stages = (SHARED_BYTES // 2 - held) // stage
    narrow = itemsize == 2 or shape.head_width <= 128
    if stages >= 2 and narrow and g * shape.head_width <= MOST_FOR_TWO.get(shape.pool_dtype, 16 * 128):
        return Config(min(stages, 6), 2)
    return Config(min((SHARED_BYTES - held) // stage, 6), 1)


def unserved(target: Target, shape: Shape) -> str | None:
    """Why this kernel cannot serve `shape`, in words."""
    if target.platform != "cuda" or target.arch != 90:
        return "it is for compute capability 9.0"
    if shape.dtype not in ("bfloat16", "float16"):
        return f"queries of {shape.dtype} would be rounded"
    if shape.group > MOST_GROUP:
        return f"{shape.group} query heads share a kv head, more than {MOST_GROUP}"
    if shape.pool_dtype == shape.dtype:
        return _unserved_plain(shape)
    return _unserved_scaled(shape)


def _unserved_plain(shape: Shape) -> str | None:
    if shape.head_width % 16 or not 64 <= shape.head_width <= 256:
        return f"head width {shape.head_width} is no multiple of 16 from 64 to 256"
    if shape.block % TILE and TILE % shape.block or shape.block < 8:
        return f"blocks of {shape.block} positions do not fit tiles of {TILE}"
    return None


def _unserved_scaled(shape: Shape) -> str | None:
    if shape.pool_dtype not in ("int8", "float8_e4m3fn"):
        return f"pools of {shape.pool_dtype} do not go with queries of {shape.dtype}"
    if jax.__version_info__ < (0, 11):
        return "pools of 8 bits need jax 0.11"
    if shape.head_width not in (64, 128, 256):
        return f"head width {shape.head_width} of 8-bit numbers is not 64, 128 or 256"
    if shape.block % TILE:
        return f"blocks of {shape.block} positions of 8 bits are no multiple of {TILE}"
    return None


def attend(
    q_BNH: jax.Array,
    k: Pool,
    v: Pool,
    table_BM: jax.Array,
    lengths_B: jax.Array,
    *,
    base: int | jax.Array,
    scale: float,
    window: int | None,
    soft_cap: float | None = None,
    sinks_N: jax.Array | None = None,
    target: Target = H200,
    config: Config | None = None,
    dtype: jnp.dtype = jnp.float32,
) -> tuple[jax.Array, jax.Array]:
    """Row b attends to the last `window` (or all) of its positions 0..lengths_b - 1; length 0 gives 0.

    Returns outputs [B, N, H] in `dtype` and the log of each softmax's mass, float32 [B, N]. `unserved` says which
    shapes may come. The deal of the work is the same for all layers of a step, and XLA makes it once.
    """
    B, N, H = q_BNH.shape
    _, K, C, _ = geometry(k)
    M = table_BM.shape[1]
    pool_dtype = jax.tree.leaves(k)[0].dtype
    config = config or rule(target, Shape(N // K, H, C, q_BNH.dtype.name, pool_dtype.name))
    dtype_of_products = jnp.dtype(jnp.bfloat16) if isinstance(k, Scaled) else q_BNH.dtype
    sizes = Sizes(K, N // K, H, C, M, config.stages, dtype_of_products, pool_dtype, scale, window, soft_cap)
    most_tiles = -(-min(M * C, window + TILE if window else M * C) // TILE)
    programs = min(max(1, config.resident * target.cores // K), B * most_tiles)
    work = deal(
        lengths_B.astype(jnp.int32), window=window, programs=programs, most_tiles=most_tiles, fixed=config.fixed
    )
    totals_IKHg, stats_IKSg = items(q_BNH, k, v, table_BM, lengths_B, jnp.asarray(base), work, sizes)
    return merge(totals_IKHg, stats_IKSg, work, sinks_N, num_heads=N, dtype=dtype, alike=config.fixed is not None)


def items(
    q_BNH: jax.Array,
    k: Pool,
    v: Pool,
    table_BM: jax.Array,
    lengths_B: jax.Array,
    base: jax.Array,
    work: Work,
    sizes: Sizes,
) -> tuple[jax.Array, jax.Array]:
    """Each item's total [I, K, H, g], not divided by its mass, and its top and mass [I, K, 2, g]."""
    num_items, programs = work.row_I.shape[0], work.bound_X.shape[0] - 1
    if sizes.apart != sizes.G:
        q_BKGH = q_BNH.reshape(len(q_BNH), sizes.K, sizes.G, sizes.H)
        q_BKGH = jnp.pad(q_BKGH, ((0, 0), (0, 0), (0, sizes.apart - sizes.G), (0, 0)))
        q_BNH = q_BKGH.reshape(len(q_BNH), -1, sizes.H)
    # A copy of g heads must not be larger than what it copies from, which lies in tiles of eight.
    missing = max(sizes.g - q_BNH.shape[1], -q_BNH.shape[1] % 8)
    if missing:
        q_BNH = jnp.pad(q_BNH, ((0, 0), (0, missing), (0, 0)))
    numbers, scales = ((k.numbers, v.numbers), (k.scales_PKC, v.scales_PKC)) if sizes.scaled else ((k, v), ())
    lists = (table_BM, lengths_B, base.reshape(1), *work[:4])
    return plgpu.kernel(
        functools.partial(program, sizes=sizes),
        out_type=[
            jax.ShapeDtypeStruct((num_items, sizes.K, sizes.H, sizes.g), jnp.float32),
            jax.ShapeDtypeStruct((num_items, sizes.K, 2, sizes.g), jnp.float32),
        ],
        scratch_types=shared_memory(sizes),
        grid=(programs, sizes.K),  # heads first: their tiles of the same blocks are neighbours in memory
        grid_names=("program", "head"),
        num_threads=2,
        thread_name="warpgroup",
        kernel_name="mosaic_decode",
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
    )(q_BNH.astype(sizes.dtype), *numbers, *scales, *(part.astype(jnp.int32) for part in lists))
