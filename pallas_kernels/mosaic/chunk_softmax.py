"""A consumer of `chunks`: the running softmax of 64 rows over the tiles of positions of each item.

    masked | whole whole whole | masked        the window's edge, what all rows see, the diagonal

Values that nobody sees may be NaN, and 0 * NaN is NaN: where a tile begins before all that is seen or ends past
all that is written, consumer 0 clears those values in shared memory before either multiplies them.

Cost: for each row and position one exp2, and one multiply-add, maximum, sum and conversion around it, while the
other consumer multiplies. Little is kept over the loops, since a few registers more would spill.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic.chunk_items import Item, Refs, Sizes, heads_of, item, out_width, turns_of_block
from pallas_kernels.mosaic.memory import ROWS, load
from pallas_kernels.mosaic.tiles import Tiles

NOTHING = -1e30  # the score of an unseen position: finite, so that a row that saw nothing yet gives no NaN
NOTHING_YET = -1e20  # tops below it are of rows that saw nothing
LOG2_E = math.log2(math.e)


class See(NamedTuple):
    """Places on the line of positions that a block meets, one item's after the other's. Scalars."""

    place: jax.Array  # of the consumer's first token
    begin: jax.Array
    end: jax.Array


class Running(NamedTuple):
    """Softmax so far of a consumer's 64 rows; tops in units of log 2."""

    total_rH: jax.Array
    top_r: jax.Array
    mass_r: jax.Array


def consume(refs: Refs, sizes: Sizes, group: jax.Array) -> None:
    """Attention of 64 rows of each of the block's items."""
    plgpu.set_max_registers(232, action="increase")

    def one(turn, done):
        what = item(refs, sizes, turn)

        @pl.when(what.at.count > 0)
        def _():
            plgpu.barrier_wait(refs.q_here)
            pl.when(group == 1)(lambda: take_turn(refs))

        state = meet_all(refs, sizes, what.at, group, done, nothing_yet(refs, sizes, what, group))
        what = item(refs, sizes, turn)  # read anew, since registers are scarce in between

        @pl.when(what.at.count > 0)
        def _():
            pl.when(group == 0)(lambda: take_turn(refs))
            plgpu.barrier_arrive(refs.q_free)
            finish(refs, sizes, what, group, state)

        return done + what.at.count

    lax.fori_loop(0, turns_of_block(refs, sizes), one, jnp.int32(0))
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
        for j in range(sizes.own_heads):
            source = refs.o_tiles.at[group, pl.ds(j * size, size), pl.ds(0, columns)]
            n = kv_head * sizes.G + jnp.minimum(head + j, sizes.G - 1)
            goal = refs.o_TNH.at[:, n, pl.ds(column, columns)]
            token, apart = group * sizes.next_token, columns < width
            pl.when(head + j < sizes.G)(functools.partial(write, source, goal, what.at, token, apart))


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


def take_turn(refs: Refs) -> None:
    """Both consumers meet: what one did before is seen by the other after."""
    plgpu.barrier_arrive(refs.turns)
    plgpu.barrier_wait(refs.turns)


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
    """Meet the item's tiles of positions in order. Those in the middle are seen whole and need no mask."""
    s, window, token = sizes.tile, sizes.window, group * sizes.next_token
    shift = done * s  # the loops count on from the block's last tile, and so do the places they compare with
    see = See(*(shift + place for place in (at.place + token, at.begin, at.end)))
    masked, whole = (functools.partial(meet, refs, sizes, see, group, masked=masked) for masked in (True, False))
    last = done + at.count
    if sizes.ordered or (window is not None and sizes.H > 128):  # three loops would not fit the registers
        return lax.fori_loop(done, last, masked, state)
    low, high = (jnp.clip(edge, token, token + sizes.own_tokens) for edge in (at.low, at.high))
    end = jnp.clip(done + lax.div(at.place + low + 1, s), done, last)
    begin = done
    if window is not None:
        unseen = jnp.maximum(at.place + high - window, 0)  # before what its last token sees
        begin = jnp.clip(done + lax.div(unseen + (s - 1), s), done, end)
        state = lax.fori_loop(done, begin, masked, state)
    state = lax.fori_loop(begin, end, whole, state)
    return lax.fori_loop(end, last, masked, state)


def meet(
    refs: Refs, sizes: Sizes, see: See, group: jax.Array, index: jax.Array, state: Running, *, masked: bool
) -> Running:
    """Add one tile of positions to the running softmax; `index` counts the block's tiles."""
    s, H = sizes.tile, sizes.H
    slot = lax.rem(index, sizes.stages)
    early = clear(refs, sizes, see, group, index) if masked else False
    plgpu.barrier_wait(refs.k_here.at[slot])

    def score(sum_rs):
        plgpu.wgmma(sum_rs, refs.q_tiles.at[group], refs.k_tiles.at[slot].transpose((1, 0)))
        take_turn(refs)
        return sum_rs[...]

    scores_rs = pl.run_scoped(score, plgpu.ACC((ROWS, s), jnp.float32))
    plgpu.barrier_arrive(refs.k_free.at[slot])
    factor = sizes.scale * LOG2_E
    if sizes.soft_cap is not None:
        factor = sizes.soft_cap * LOG2_E
        scores_rs = tanh(scores_rs * (sizes.scale / sizes.soft_cap))
    if masked:
        scores_rs = jnp.where(seen(sizes, see, index), scores_rs, NOTHING)
    top_r = jnp.maximum(state.top_r, scores_rs.max(axis=1) * factor)
    keep_r = jnp.exp2(state.top_r - top_r)
    # Below a real top, exp2 makes exactly 0 of what is unseen; where nothing was seen yet, below 0.
    level_r = jnp.where(top_r > NOTHING_YET, top_r, 0.0) if masked else top_r
    weights_rs = jnp.exp2(scores_rs * factor - lax.broadcast_in_dim(level_r, scores_rs.shape, [0]))
    total_rH = state.total_rH * lax.broadcast_in_dim(keep_r, state.total_rH.shape, [0])
    mass_r = state.mass_r * keep_r + weights_rs.sum(axis=1)
    weights_rs = weights_rs.astype(refs.v_PKCH.dtype)
    plgpu.barrier_arrive(refs.turns)
    if masked:
        pl.when(jnp.logical_not(early))(lambda: plgpu.barrier_wait(refs.v_here.at[slot]))
    else:
        plgpu.barrier_wait(refs.v_here.at[slot])
    plgpu.barrier_wait(refs.turns)

    def add(sum_rH):
        sum_rH[...] = total_rH
        plgpu.wgmma(sum_rH, weights_rs, refs.v_tiles.at[slot])
        return sum_rH[...]

    total_rH = pl.run_scoped(add, plgpu.ACC((ROWS, H), jnp.float32))
    plgpu.barrier_arrive(refs.v_free.at[slot])
    return Running(total_rH, top_r, mass_r)


def tanh(x: jax.Array) -> jax.Array:
    """By way of exp2 and rsqrt: tanh.approx errs by 5e-4 of its result, which a cap of 50 makes 0.02 of a score."""
    root = lax.rsqrt(1.0 + jnp.exp2(x * (2 * LOG2_E)))
    return 1.0 - 2.0 * (root * root)


def seen(sizes: Sizes, see: See, index: jax.Array) -> jax.Array:
    """[64, s]: which positions of a tile each row sees. Rows are heads times tokens, tokens last."""
    shape = (ROWS, sizes.tile)
    row_rs = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=plgpu.Layout.WGMMA)
    place_rs = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA)
    token_rs = row_rs & (sizes.own_tokens - 1)
    back_rs = (see.place - index * sizes.tile) + token_rs - place_rs  # from the token to the position
    return back_rs >= 0 if sizes.window is None else (back_rs >= 0) & (back_rs < sizes.window)


def clear(refs: Refs, sizes: Sizes, see: See, group: jax.Array, index: jax.Array) -> jax.Array:
    """Set the values of a tile that nobody sees to 0, and tell whether it had any and they were waited for."""
    s, H = sizes.tile, sizes.H
    width = 64 if H % 64 == 0 else H
    slot = lax.rem(index, sizes.stages)
    low = jnp.int32(0) if sizes.window is None else see.begin - index * s
    high = see.end - index * s
    mine = (group == 0) & ((low > 0) | (high < s))

    @pl.when(mine)
    def _():
        plgpu.barrier_wait(refs.v_here.at[slot])
        for row in range(0, s, ROWS):
            place_rh = row + plgpu.broadcasted_iota(jnp.int32, (ROWS, width), 0, layout=plgpu.Layout.WGMMA)
            seen_rh = (place_rh >= low) & (place_rh < high)
            for column in range(0, H, width):
                piece = refs.v_tiles.at[slot, pl.ds(row, ROWS), pl.ds(column, width)]
                v_rh = load(piece, plgpu.Layout.WGMMA)
                piece[...] = jnp.where(seen_rh, v_rh, jnp.zeros_like(v_rh))
        plgpu.commit_smem()

    return mine
