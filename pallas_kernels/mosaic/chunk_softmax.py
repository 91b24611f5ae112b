"""A consumer of `chunks`: the running softmax of 64 rows over the tiles of positions of each item.

    masked | whole whole whole | masked        the first tile, what all rows see, the diagonal
    masked   masked              masked        with a window

The products of two tiles go to the tensor cores in one turn, and while the other consumer has its turn and
multiplies, the scores become weights:

    turn     QK0        QK1 PV0        QK2 PV1        PV2
    between       max, exp2, sum  max, exp2, sum  ..

Values that nobody sees may be NaN, and 0 * NaN is NaN: where the first tile begins before all that is seen or the
last ends past all that is written, consumer 0 clears those values in shared memory, before its turn and so before
the other's.

Cost: for each row and position one exp2, and one multiply-add, maximum, sum and conversion around it. Few scalars
live through the loops, since a few registers more would spill.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic.chunk_items import Item, Refs, Sizes, heads_of, item, out_width, turns_of_block
from pallas_kernels.mosaic.memory import ROWS, box_bytes, load
from pallas_kernels.mosaic.tiles import Tiles
from pallas_kernels.numerics import LOG2_E, NOTHING

NOTHING_YET = -1e20  # tops below it are of rows that saw nothing


class Running(NamedTuple):
    """Softmax so far of a consumer's 64 rows; tops in units of log 2."""

    total_rH: jax.Array  # without the last tile
    top_r: jax.Array
    mass_r: jax.Array
    weights_rs: jax.Array | None = None  # of the last tile


def consume(refs: Refs, sizes: Sizes, group: jax.Array) -> None:
    """Attention of 64 rows of each of the block's items."""
    plgpu.set_max_registers(232, action="increase")
    pl.when(group == 1)(lambda: plgpu.barrier_arrive(refs.turns.at[0]))  # the first turn is the other's

    def one(turn, done):
        what = item(refs, sizes, turn)

        @pl.when(what.at.count > 0)
        def _():
            plgpu.barrier_wait(refs.q_here)
            state = meet_all(refs, sizes, what.at, group, done, nothing_yet(refs, sizes, what, group))
            again = item(refs, sizes, turn)  # read anew: registers were scarce
            state = add_last(refs, sizes, again.at, group, done, state)
            finish(refs, sizes, again, group, state)

        return done + what.at.count

    lax.fori_loop(0, turns_of_block(refs, sizes), one, jnp.int32(0))
    pl.when(group == 0)(lambda: plgpu.barrier_wait(refs.turns.at[0]))
    plgpu.wait_smem_to_gmem(0)


def finish(refs: Refs, sizes: Sizes, what: Item, group: jax.Array, state: Running) -> None:
    """Divide by the masses and write what is ready, while the next item's queries come."""
    width, size = out_width(sizes.H), sizes.own_tokens
    share_r = jnp.where(state.mass_r > 0, 1.0 / state.mass_r, 0.0)
    o_rH = state.total_rH * lax.broadcast_in_dim(share_r, state.total_rH.shape, [0])
    o_rH = o_rH.astype(refs.o_TNH.dtype)
    lse_r = (state.top_r + jnp.log2(state.mass_r)) * (1 / LOG2_E)
    kv_head, head = heads_of(sizes, what, group)
    for column in range(0, sizes.H, width):
        columns = min(width, sizes.H - column)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # what was written last is read
        refs.o_tiles[group, :, pl.ds(0, columns)] = o_rH[:, column : column + columns]
        if not column:
            refs.lse_tiles[group] = lse_r
        plgpu.commit_smem()
        if not column:
            plgpu.copy_smem_to_gmem(refs.lse_tiles.at[group], refs.lse.at[what.tile, what.part, group])
        goal_TNH = refs.o_TNH.at[:, :, pl.ds(column, columns)]

        @pl.loop(0, jnp.clip(sizes.G - head, 0, sizes.own_heads))  # not those that are another's double
        def _(j, column=column, columns=columns, goal_TNH=goal_TNH):
            source = refs.o_tiles.at[group, pl.ds(j * size, size), pl.ds(0, columns)]
            token = group * sizes.next_token
            write(source, goal_TNH.at[:, kv_head * sizes.G + head + j], what.at, token, apart=columns < width)


def write(source: jax.Array, goal_TH: jax.Array, at: Tiles, token: jax.Array, apart: bool) -> None:
    """Copy the outputs of one head to their tokens; `token` is the consumer's first within the tile.

    apart    lines of the source do not follow each other, which a copy of several would need
    """
    size = source.shape[0]
    low, high = (jnp.clip(edge - token, 0, size) for edge in (at.low, at.high))

    def one_by_one():
        @pl.loop(low, high)
        def _(i):
            plgpu.copy_smem_to_gmem(source.at[pl.ds(i, 1)], goal_TH.at[pl.ds(at.token + token + i, 1)])

    if apart:
        return one_by_one()
    whole = (low == 0) & (high == size)
    goal_tH = goal_TH.at[pl.ds(at.token + token, size)]
    pl.when(whole)(lambda: plgpu.copy_smem_to_gmem(source, goal_tH))
    pl.when(jnp.logical_not(whole))(one_by_one)


def nothing_yet(refs: Refs, sizes: Sizes, what: Item, group: jax.Array) -> Running:
    """The softmax of no position; a sink is a score without a value."""
    column = plgpu.Layout.WGMMA.reduce(1)
    total_rH = plgpu.layout_cast(jnp.zeros((ROWS, sizes.H), jnp.float32), plgpu.Layout.WGMMA)
    if sizes.sinks:
        sink_r = load(refs.sinks.at[what.part, group], column, optimized=False)
        return Running(total_rH, sink_r, plgpu.layout_cast(jnp.ones((ROWS,), jnp.float32), column))
    top_r = plgpu.layout_cast(jnp.full((ROWS,), NOTHING, jnp.float32), column)
    return Running(total_rH, top_r, plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), column))


def meet_all(refs: Refs, sizes: Sizes, at: Tiles, group: jax.Array, done: jax.Array, state: Running) -> Running:
    """Weigh the item's tiles of positions in order. Those that all rows see whole need no mask."""
    token = group * sizes.next_token
    # The loops count on from the block's last tile, and so does the place of the first token.
    step = functools.partial(meet, refs, sizes, done * sizes.tile + at.place + token, group)
    state = meet_first(refs, sizes, at, group, done, state)
    end = begin = done + 1
    # A window's edge would take a third loop, and that more registers than there are.
    if not sizes.ordered and sizes.window is None:
        low = jnp.clip(at.low, token, token + sizes.own_tokens)
        end = jnp.clip(done + lax.div(at.place + low + 1, sizes.tile), begin, done + at.count)
        state = lax.fori_loop(begin, end, functools.partial(step, masked=False), state)
    state = lax.fori_loop(end, done + at.count, functools.partial(step, masked=True), state)
    plgpu.barrier_arrive(refs.q_free)
    return state


def meet_first(refs: Refs, sizes: Sizes, at: Tiles, group: jax.Array, index: jax.Array, state: Running) -> Running:
    """Weigh an item's first tile of positions."""

    def score(sum_rs):
        multiply_keys(refs, sizes, group, index, sum_rs)
        plgpu.barrier_arrive(refs.turns.at[1 - group])
        return sum_rs[...]

    await_turn(refs, sizes, group, index)
    scores_rs = pl.run_scoped(score, plgpu.ACC((ROWS, sizes.tile), jnp.float32))
    slot = lax.rem(index, sizes.stages)
    plgpu.barrier_arrive(refs.k_free.at[slot])
    seen_rs = seen(sizes, at.place + group * sizes.next_token)
    _, state = weigh(sizes, scores_rs, seen_rs, state)
    plgpu.barrier_wait(refs.v_here.at[slot])
    if sizes.window is not None:
        unseen = (group == 0) & (at.begin > 0)
        pl.when(unseen)(lambda: clear(refs.v_tiles.at[slot], at.begin, sizes.tile))
    return state._replace(weights_rs=state.weights_rs.astype(refs.v_PKCH.dtype))


def meet(
    refs: Refs, sizes: Sizes, place: jax.Array, group: jax.Array, index: jax.Array, state: Running, *, masked: bool
) -> Running:
    """Weigh one tile of positions and add the one before; `index` counts the block's tiles.

    place    of the consumer's first token, on a line where tile 0 of the block begins at 0
    """

    def both(sum_rH, sum_rs):
        sum_rH[...] = state.total_rH
        multiply_keys(refs, sizes, group, index, sum_rs)
        multiply_values(refs, sizes, index - 1, state, sum_rH)
        plgpu.barrier_arrive(refs.turns.at[1 - group])
        scores_rs = plgpu.wgmma_accumulator_load(sum_rs, wait_n=1)
        plgpu.barrier_arrive(refs.k_free.at[lax.rem(index, sizes.stages)])
        seen_rs = seen(sizes, place - index * sizes.tile) if masked else None
        keep_r, new = weigh(sizes, scores_rs, seen_rs, state)
        return sum_rH[...], keep_r, new

    await_turn(refs, sizes, group, index)
    sums = plgpu.ACC((ROWS, sizes.H), jnp.float32), plgpu.ACC((ROWS, sizes.tile), jnp.float32)
    total_rH, keep_r, state = pl.run_scoped(both, *sums)
    plgpu.barrier_arrive(refs.v_free.at[lax.rem(index - 1, sizes.stages)])
    total_rH *= lax.broadcast_in_dim(keep_r, total_rH.shape, [0])
    # Rounded not before the product that reads the old weights is done: these may take their registers.
    weights_rs = state.weights_rs.astype(refs.v_PKCH.dtype)
    plgpu.barrier_wait(refs.v_here.at[lax.rem(index, sizes.stages)])
    return state._replace(total_rH=total_rH, weights_rs=weights_rs)


def add_last(refs: Refs, sizes: Sizes, at: Tiles, group: jax.Array, done: jax.Array, state: Running) -> Running:
    """Add the item's last tile of positions."""
    index = done + at.count - 1
    slot = lax.rem(index, sizes.stages)
    end = at.end - (at.count - 1) * sizes.tile
    pl.when((group == 0) & (end < sizes.tile))(lambda: clear(refs.v_tiles.at[slot], 0, end))

    def add(sum_rH):
        sum_rH[...] = state.total_rH
        multiply_values(refs, sizes, index, state, sum_rH)
        plgpu.barrier_arrive(refs.turns.at[1 - group])
        return sum_rH[...]

    plgpu.barrier_wait(refs.turns.at[group])
    total_rH = pl.run_scoped(add, plgpu.ACC((ROWS, sizes.H), jnp.float32))
    plgpu.barrier_arrive(refs.v_free.at[slot])
    return state._replace(total_rH=total_rH)


def await_turn(refs: Refs, sizes: Sizes, group: jax.Array, index: jax.Array) -> None:
    """The keys are there, and the other consumer has given its products to the tensor cores."""
    plgpu.barrier_wait(refs.k_here.at[lax.rem(index, sizes.stages)])
    plgpu.barrier_wait(refs.turns.at[group])


def multiply_keys(refs: Refs, sizes: Sizes, group: jax.Array, index: jax.Array, sum_rs: jax.Array) -> None:
    """Begin the scores of tile `index`."""
    slot = lax.rem(index, sizes.stages)
    group = jnp.where(index < 0, 0, group)  # never; else a loop keeps H / 16 addresses of queries in registers
    plgpu.wgmma(sum_rs, refs.q_tiles.at[group], refs.k_tiles.at[slot].transpose((1, 0)))


def multiply_values(refs: Refs, sizes: Sizes, index: jax.Array, state: Running, sum_rH: jax.Array) -> None:
    """Begin to add the values of tile `index`."""
    plgpu.wgmma(sum_rH, state.weights_rs, refs.v_tiles.at[lax.rem(index, sizes.stages)])


def weigh(
    sizes: Sizes, scores_rs: jax.Array, seen_rs: jax.Array | None, state: Running
) -> tuple[jax.Array, Running]:
    """What is left of the total so far, and the softmax with one tile more, its weights in float32."""
    factor = sizes.scale * LOG2_E
    if sizes.soft_cap is not None:
        factor = sizes.soft_cap * LOG2_E
        scores_rs = tanh(scores_rs * (sizes.scale / sizes.soft_cap))
    if seen_rs is not None:
        scores_rs = jnp.where(seen_rs, scores_rs, NOTHING)
    top_r = jnp.maximum(state.top_r, scores_rs.max(axis=1) * factor)
    keep_r = jnp.exp2(state.top_r - top_r)
    # Below a real top, exp2 makes exactly 0 of what is unseen; where nothing was seen yet, below 0.
    level_r = top_r if seen_rs is None else jnp.where(top_r > NOTHING_YET, top_r, 0.0)
    weights_rs = jnp.exp2(scores_rs * factor - lax.broadcast_in_dim(level_r, scores_rs.shape, [0]))
    mass_r = state.mass_r * keep_r + weights_rs.sum(axis=1)
    return keep_r, Running(state.total_rH, top_r, mass_r, weights_rs)


def tanh(x: jax.Array) -> jax.Array:
    """By way of exp2 and rsqrt: tanh.approx errs by 5e-4 of its result, which a cap of 50 makes 0.02 of a score."""
    root = lax.rsqrt(1.0 + jnp.exp2(x * (2 * LOG2_E)))
    return 1.0 - 2.0 * (root * root)


def seen(sizes: Sizes, place: jax.Array) -> jax.Array:
    """[64, s]: which positions of a tile each row sees. Rows are heads times tokens, tokens last.

    place    of the consumer's first token, counted from the tile's first position
    """
    shape = (ROWS, sizes.tile)
    row_rs = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=plgpu.Layout.WGMMA)
    place_rs = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA)
    back_rs = place + (row_rs & (sizes.own_tokens - 1)) - place_rs  # from the token to the position
    if sizes.window is None:
        return back_rs >= 0
    return back_rs.astype(jnp.uint32) < jnp.uint32(sizes.window)  # negative ones are the largest


def clear(values_sH: jax.Array, low: int | jax.Array, high: int | jax.Array) -> None:
    """Set all but the positions low..high - 1 to 0, a few registers at a time."""
    s, H = values_sH.shape
    width = box_bytes(2 * H) // 2
    for row in range(0, s, ROWS):
        place_rh = row + plgpu.broadcasted_iota(jnp.int32, (ROWS, width), 0, layout=plgpu.Layout.WGMMA)
        seen_rh = (place_rh >= low) & (place_rh < high)
        for column in range(0, H, width):
            piece = values_sH.at[pl.ds(row, ROWS), pl.ds(column, width)]
            v_rh = load(piece, plgpu.Layout.WGMMA)
            piece[...] = jnp.where(seen_rh, v_rh, jnp.zeros_like(v_rh))
    plgpu.commit_smem()
