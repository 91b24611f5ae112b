"""Items of a row become its output: the merge of partial softmaxes by log-sum-exp, and the sink's place.

    item    top -3   mass 2.0   total [H, g]
    item    top  1   mass 1.5   total [H, g]      the same scale for all: 2 ** (top - the largest top)
    sink    top  2   mass 1.0   nothing

One program serves a row, a kv head and 64 of the head width, in the layout in which tensor cores left the totals;
heads come first again on the way out. Several items are loaded at a time. Where a step has few rows, so that each
may have hundreds of items, four warpgroups take every fourth of those loads and the first one merges the four.
Tops are logarithms to base 2.

Cost: each item's H x g float32 once, and H x G for each row; dead items are not read. What takes time is one load
that waits for another: items are loaded four at a time, or 64 where rows are few.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic.memory import ROWS, load, parts_of
from pallas_kernels.numerics import LN_2, NOTHING
from pallas_kernels.work import Work

FEW = 256  # programs that a device runs at once with room to spare
L = plgpu.Layout
OF_HG, OF_G = L.WGMMA, L.WGMMA.reduce(0)


class Form(NamedTuple):
    """What a kernel is compiled for."""

    group: int
    width: int
    padded: int
    together: int  # items that a warpgroup loads at a time
    warpgroups: int
    sinks: bool


class Partial(NamedTuple):
    """Attention over some positions, in registers; not yet divided by its mass."""

    total_hg: jax.Array  # of 64 of the head width
    top_g: jax.Array
    mass_g: jax.Array


def merge(
    totals_IKHg: jax.Array,
    stats_IKSg: jax.Array,
    work: Work,
    sinks_N: jax.Array | None,
    *,
    num_heads: int,
    dtype: jnp.dtype,
    alike: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Outputs [B, N, H] in `dtype` and the log of each softmax's mass, float32 [B, N]; 0 and -inf without items.

    stats_IKSg  the top and the mass of each item and head; heads are padded to a multiple of 8
    alike       add items in one order, however many rows there are
    """
    _, K, H, g = totals_IKHg.shape
    B, G, parts = work.first_B.shape[0], num_heads // K, len(parts_of(H))
    together, warpgroups = (16, 4) if B * K * parts <= FEW and not alike else (4, 1)
    form = Form(G, H, g, max(1, together * 8 // g), warpgroups, sinks_N is not None)
    sinks_N = jnp.zeros(num_heads, jnp.float32) if sinks_N is None else sinks_N.astype(jnp.float32)
    sinks_Kg = jnp.pad(sinks_N.reshape(K, G), ((0, 0), (0, g - G)))
    others = max(1, warpgroups - 1)
    o_BNH, lse_BKg = plgpu.kernel(
        functools.partial(program, form=form),
        out_type=[jax.ShapeDtypeStruct((B, num_heads, H), dtype), jax.ShapeDtypeStruct((B, K, g), jnp.float32)],
        scratch_types=[
            plgpu.SMEM((g, ROWS), dtype),
            plgpu.SMEM((others, ROWS, g), jnp.float32),
            plgpu.SMEM((others, 2, g), jnp.float32),
            plgpu.Barrier(num_arrivals=others),
        ],
        grid=(B, K, parts),
        grid_names=("row", "head", "part"),
        num_threads=warpgroups,
        thread_name="warpgroup",
        kernel_name="mosaic_merge",
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
    )(totals_IKHg, stats_IKSg, sinks_Kg, work.first_B, work.items_B)
    return o_BNH, lse_BKg[..., :G].reshape(B, num_heads)


def program(totals, stats, sinks, first_B, items_B, o, lse, o_tile, other_totals, other_stats, given, *, form):
    """One row, kv head and part of the head width."""
    row, head, part = (lax.axis_index(name) for name in ("row", "head", "part"))
    me = lax.axis_index("warpgroup")
    count = items_B[row]
    start = jnp.minimum(part * ROWS, form.width - ROWS)
    mine = merge_every(totals, stats, first_B[row], count, head, start, me, form)

    @pl.when(me > 0)
    def give():
        other_totals.at[me - 1][...] = mine.total_hg
        other_stats.at[me - 1, 0][...] = mine.top_g
        other_stats.at[me - 1, 1][...] = mine.mass_g
        plgpu.barrier_arrive(given)

    @pl.when(me == 0)
    def finish():
        whole = mine
        if form.warpgroups > 1:
            plgpu.barrier_wait(given)
            others = range(form.warpgroups - 1)
            whole = add(whole, [held(other_totals.at[i], other_stats.at[i]) for i in others])
        if form.sinks:
            top_g = load(sinks.at[head], OF_G, optimized=False) * (1 / LN_2)
            whole = add(whole, [Partial(jnp.zeros_like(whole.total_hg), top_g, jnp.ones_like(top_g))])
        live_g = (whole.mass_g > 0) & (count > 0)
        o_hg = whole.total_hg * wide(jnp.where(live_g, 1 / whole.mass_g, 0.0))
        o_tile.transpose((1, 0))[...] = plgpu.layout_cast(o_hg.astype(o_tile.dtype), L.WGMMA_TRANSPOSED)

        @pl.when(part == 0)
        def say():
            lse.at[row, head][...] = jnp.where(live_g, (whole.top_g + jnp.log2(whole.mass_g)) * LN_2, -jnp.inf)

        plgpu.commit_smem()
        heads = pl.ds(head * form.group, form.group)
        plgpu.copy_smem_to_gmem(o_tile.at[pl.ds(0, form.group)], o.at[row, heads, pl.ds(start, ROWS)])
        plgpu.wait_smem_to_gmem(0)


def merge_every(totals, stats, first, count, head, start, me, form: Form) -> Partial:
    """The items of a row that fall to warpgroup `me`."""
    step = form.together * form.warpgroups

    def some(turn, so_far):
        indices = [turn * step + me * form.together + j for j in range(form.together)]
        items = [first + jnp.minimum(index, count - 1) for index in indices]
        parts = [held(totals.at[item, head, pl.ds(start, ROWS)], stats.at[item, head]) for item in items]
        # What is loaded twice, for want of more items, weighs nothing the second time.
        tops = [jnp.where(index < count, part.top_g, NOTHING) for index, part in zip(indices, parts, strict=True)]
        masses = [jnp.where(index < count, part.mass_g, 0.0) for index, part in zip(indices, parts, strict=True)]
        return add(so_far, [Partial(p.total_hg, *rest) for p, *rest in zip(parts, tops, masses, strict=True)])

    zeros_hg = plgpu.layout_cast(jnp.zeros((ROWS, form.padded), jnp.float32), OF_HG)
    top_g = plgpu.layout_cast(jnp.full((form.padded,), NOTHING, jnp.float32), OF_G)
    mass_g = plgpu.layout_cast(jnp.zeros((form.padded,), jnp.float32), OF_G)
    return lax.fori_loop(0, lax.div(count + (step - 1), step), some, Partial(zeros_hg, top_g, mass_g))


def held(total, stats) -> Partial:
    """What lies in memory of an item."""
    top_g, mass_g = (load(stats.at[i], OF_G, optimized=False) for i in range(2))
    return Partial(load(total, OF_HG, optimized=False), top_g, mass_g)


def add(whole: Partial, parts: list[Partial]) -> Partial:
    """All together; parts in their order."""
    top_g = functools.reduce(jnp.maximum, [part.top_g for part in parts], whole.top_g)
    keep_g = jnp.exp2(whole.top_g - top_g)
    total_hg, mass_g = whole.total_hg * wide(keep_g), whole.mass_g * keep_g
    for part in parts:
        share_g = jnp.exp2(part.top_g - top_g)
        total_hg, mass_g = total_hg + part.total_hg * wide(share_g), mass_g + part.mass_g * share_g
    return Partial(total_hg, top_g, mass_g)


def wide(x_g: jax.Array) -> jax.Array:
    """One number a head, for 64 of the head width."""
    return lax.broadcast_in_dim(x_g, (ROWS, *x_g.shape), [1])
