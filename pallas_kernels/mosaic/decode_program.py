"""One program of the decode kernel: a warpgroup that fetches tiles, and one that attends to them.

    ring       places 0..stages - 1 for tiles of keys, and as many for values; tile t has place t % stages
    producer   waits for a free place, begins the copies, goes on       k_free, v_free, q_free
    consumer   waits for what came, multiplies, gives the place back    k_here, v_here, q_here

Queries have two places, so that those of the next item come while this one is attended to. The producer looks up a
tile's blocks one tile ahead, so that the table's latency is hidden. At the end it sees every place given back.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic.decode_tiles import Refs, Seen, Sizes, add_values, copy_keys, copy_values, scores
from pallas_kernels.mosaic.memory import ROWS, parts_of
from pallas_kernels.numerics import LOG2_E, NOTHING
from pallas_kernels.work import TILE

L = plgpu.Layout


def program(q_BNH, k, v, *rest, sizes: Sizes, **shared):
    """Both warpgroups of one program: a share of the items, for one kv head."""
    split = 2 if sizes.scaled else 0
    refs = Refs(q_BNH, k, v, rest[:split], *rest[split:], **shared)
    index = lax.axis_index("program")
    begin, end = refs.bound_X[index], refs.bound_X[index + 1]
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
    heads = pl.ds(head * sizes.apart, sizes.g)  # those past the group are another's, or 0: nobody looks at them
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
