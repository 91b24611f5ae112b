"""Attention of rows with one token each, as a kernel for Hopper: heads are the narrow side of both products.

As many programs as the device holds at once share out all rows' tiles evenly (`work`), for each kv head. A program
is two warpgroups, a producer that keeps a ring of stages filled and a consumer that empties it, and goes on from
one item, a stretch of one row's tiles, to the next without letting the ring run dry:

    items      a a a a|b b|c c c c          a program's share of the list
    producer   K0 V0 K1 V1 K2 V2 ..         waits for a free place; looks up a tile's blocks while it waits
    consumer   QK0 softmax VP0 QK1 ..       after an item's last tile writes its total, top and mass

`merge` then joins the items of a row. There is one consumer, not two that take turns: another program on the same
multiprocessor fills its pauses as well, needs no merging in shared memory and no even number of stages.

Table entries past a row's end are not followed: block 0 is read in their place, and masked.
Cost: keys and values once; for each item and kv head (H + 2) x g float32, written and read back. A tile costs the
consumer about a microsecond, in which two programs want twice the bytes that a multiprocessor can get.
Source: FlashDecoding; FlashMLA's and Stream-K's even shares.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic.decode_tiles import (
    Refs,
    Seen,
    Sizes,
    add_values,
    copy_keys,
    copy_values,
    scores,
    shared_memory,
)
from pallas_kernels.mosaic.memory import ROWS, parts_of
from pallas_kernels.mosaic.merge import merge
from pallas_kernels.pools import Pool, Scaled, geometry
from pallas_kernels.shape import Shape
from pallas_kernels.target import H200, Target
from pallas_kernels.work import TILE, Work, deal

NOTHING = -1e30  # the score of an unseen position: finite, so that a row that saw nothing yet gives no NaN
LOG2_E = math.log2(math.e)
SHARED_BYTES = 233472  # of a multiprocessor
RESERVED_BYTES = 1024 + 2048 + 1024  # of a program, for the system, reductions and barriers
MOST_GROUP = 32
MOST_FOR_TWO = {"float8_e4m3fn": 8 * 128}  # heads x head width up to which a thread takes at most 128 registers
L = plgpu.Layout


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
    most_tiles = -(-M * C // TILE)
    programs = min(max(1, config.resident * target.cores // K), B * most_tiles)
    work = deal(
        lengths_B.astype(jnp.int32), window=window, programs=programs, most_tiles=most_tiles, fixed=config.fixed
    )
    totals_IKHg, stats_IKSg = items(q_BNH, k, v, table_BM, lengths_B, jnp.asarray(base), work, sizes)
    return merge(totals_IKHg, stats_IKSg, work, sinks_N, num_heads=N, dtype=dtype)


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
    num_items, programs = work.row_I.shape[0], work.begin_X.shape[0]
    if q_BNH.shape[1] < sizes.g:  # a copy of g heads must not be larger than what it copies from
        q_BNH = jnp.pad(q_BNH, ((0, 0), (0, sizes.g - q_BNH.shape[1]), (0, 0)))
    numbers, scales = ((k.numbers, v.numbers), (k.scales_PKC, v.scales_PKC)) if sizes.scaled else ((k, v), ())
    lists = (table_BM, lengths_B, base.reshape(1), *work[:5])
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
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
    )(q_BNH.astype(sizes.dtype), *numbers, *scales, *(part.astype(jnp.int32) for part in lists))


def program(q_BNH, k, v, *rest, sizes: Sizes, **shared):
    """Both warpgroups of one program: a share of the items, for one kv head."""
    split = 2 if sizes.scaled else 0
    refs = Refs(q_BNH, k, v, rest[:split], *rest[split:], **shared)
    index = lax.axis_index("program")
    begin, end = refs.begin_X[index], refs.end_X[index]
    consumer = lax.axis_index("warpgroup") == 0
    pl.when(consumer)(lambda: consume(refs, sizes, begin, end))
    pl.when(jnp.logical_not(consumer))(lambda: produce(refs, sizes, begin, end))


def produce(refs: Refs, sizes: Sizes, begin: jax.Array, end: jax.Array) -> None:
    """Fetch the items' queries and tiles in order, and see every place empty at the end."""
    done = lax.fori_loop(begin, end, functools.partial(fetch, refs, sizes, begin), jnp.int32(0))
    for barriers, count, places in (
        (refs.k_free, done, sizes.stages),
        (refs.v_free, done, sizes.stages),
        (refs.q_free, end - begin, 2),
    ):
        pl.loop(jnp.maximum(count - places, 0), count)(
            lambda t, barriers=barriers, places=places: plgpu.barrier_wait(barriers.at[lax.rem(t, places)])
        )


def fetch(refs: Refs, sizes: Sizes, begin: jax.Array, item: jax.Array, done: jax.Array) -> jax.Array:
    """Bring one item; `done` tiles came before. Returns how many have come now."""
    head = lax.axis_index("head")
    row, first, count = refs.row_I[item], refs.first_I[item], refs.count_I[item]
    nth = item - begin
    place = lax.rem(nth, 2)
    pl.when(nth >= 2)(lambda: plgpu.barrier_wait(refs.q_free.at[place]))
    heads = pl.ds(head * sizes.G, sizes.g)  # those past the group are another's, or 0, and nobody looks at them
    plgpu.copy_gmem_to_smem(refs.q_BNH.at[row, heads], refs.q_tiles.at[place], refs.q_here.at[place])

    def tile(t, blocks):
        slot = lax.rem(done + t, sizes.stages)
        following = blocks_of(refs, sizes, row, first + t + 1)
        offset = lax.rem((first + t) * TILE, sizes.C) if sizes.C > TILE else 0
        for copy, free in ((copy_keys, refs.k_free), (copy_values, refs.v_free)):
            pl.when(done + t >= sizes.stages)(lambda free=free: plgpu.barrier_wait(free.at[slot]))
            copy(refs, sizes, head, blocks, offset, slot)
        return following

    lax.fori_loop(0, count, tile, blocks_of(refs, sizes, row, first))
    return done + count


def blocks_of(refs: Refs, sizes: Sizes, row: jax.Array, tile: jax.Array) -> tuple[jax.Array, ...]:
    """The blocks of a tile in the whole pool; what lies past the row's end is block 0."""
    length, base = refs.lengths_B[row], refs.base[0]
    blocks = []
    for position in (tile * TILE + j * sizes.box for j in range(TILE // sizes.box)):
        column = jnp.minimum(lax.div(position, sizes.C), sizes.M - 1)
        blocks.append(base + jnp.where(position < length, refs.table_BM[row, column], 0))
    return tuple(blocks)


def consume(refs: Refs, sizes: Sizes, begin: jax.Array, end: jax.Array) -> None:
    """Attend to the items in order."""
    lax.fori_loop(begin, end, functools.partial(attend_item, refs, sizes, begin), jnp.int32(0))


def attend_item(refs: Refs, sizes: Sizes, begin: jax.Array, item: jax.Array, done: jax.Array) -> jax.Array:
    """Attend to one item and write what it gives. Returns how many tiles are done now."""
    head, g = lax.axis_index("head"), sizes.g
    length, first, count = refs.lengths_B[refs.row_I[item]], refs.first_I[item], refs.count_I[item]
    begin_seen = jnp.int32(0) if sizes.window is None else jnp.maximum(length - sizes.window, 0)
    q_slot = lax.rem(item - begin, 2)
    plgpu.barrier_wait(refs.q_here.at[q_slot])

    def tile(t, carry):
        parts, top_g, mass_sg = carry
        slot = lax.rem(done + t, sizes.stages)
        seen = Seen((first + t) * TILE, begin_seen, length)
        scores_sg = in_bits(scores(refs, sizes, slot, q_slot), sizes)
        scores_sg = jnp.where(seen.mask(scores_sg.shape, 0), scores_sg, NOTHING)
        new_top_g = jnp.maximum(top_g, scores_sg.max(axis=0))
        keep_sg = wide(jnp.exp2(top_g - new_top_g))
        weights_sg = jnp.exp2(scores_sg - wide(new_top_g))
        added = add_values(refs, sizes, slot, weights_sg, seen)
        parts = [part * keep_sg + more for part, more in zip(parts, added, strict=True)]
        return parts, new_top_g, mass_sg * keep_sg + weights_sg

    zeros = plgpu.layout_cast(jnp.zeros((ROWS, g), jnp.float32), L.WGMMA)
    top_g = plgpu.layout_cast(jnp.full((g,), NOTHING, jnp.float32), L.WGMMA.reduce(0))
    starts = parts_of(sizes.H)
    parts, top_g, mass_sg = lax.fori_loop(0, count, tile, ([zeros] * len(starts), top_g, zeros))
    plgpu.barrier_arrive(refs.q_free.at[q_slot])
    for start, part in zip(starts, parts, strict=True):
        refs.totals_IKHg.at[item, head, pl.ds(start, ROWS)][...] = part
    refs.stats_IKSg.at[item, head, 0][...] = top_g
    refs.stats_IKSg.at[item, head, 1][...] = mass_sg.sum(axis=0)
    return done + count


def wide(x_g: jax.Array) -> jax.Array:
    """One number a head, for all 64 rows of a tensor core's result."""
    return lax.broadcast_in_dim(x_g, (ROWS, *x_g.shape), [1])


def in_bits(scores_sg: jax.Array, sizes: Sizes) -> jax.Array:
    """Scaled and capped scores as logarithms to base 2. The hardware's own tanh would err by half a percent."""
    if sizes.soft_cap is None:
        return scores_sg * (sizes.scale * LOG2_E)
    grown_sg = jnp.exp2(scores_sg * (2 * LOG2_E * sizes.scale / sizes.soft_cap))
    return (1 - 2 / (1 + grown_sg)) * (sizes.soft_cap * LOG2_E)
