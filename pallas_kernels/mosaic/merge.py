"""Items of a row become its output: the merge of partial softmaxes by log-sum-exp, and the sink's place.

    item    top -3   mass 2.0   total [H, g]
    item    top  1   mass 1.5   total [H, g]      the same scale for all: 2 ** (top - the largest top)
    sink    top  2   mass 1.0   nothing

One program a row and kv head reads the row's items, eight at a time so that their loads overlap, in the layout in
which tensor cores left them; the heads come first again on the way out. Tops are logarithms to base 2.

Cost: each item's H x g float32 once, and H x G for each row. Items of dead rows are not read.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic.memory import ROWS, load, parts_of
from pallas_kernels.work import Work

LN_2 = math.log(2)
NOTHING = -1e30
L = plgpu.Layout


class Form(NamedTuple):
    """What a kernel is compiled for."""

    group: int
    width: int
    starts: tuple[int, ...]  # of the 64 rows of each part of H
    together: int
    sinks: bool


def merge(
    totals_IKHg: jax.Array, stats_IKSg: jax.Array, work: Work, sinks_N: jax.Array | None, *, num_heads: int, dtype
) -> tuple[jax.Array, jax.Array]:
    """Outputs [B, N, H] in `dtype` and the log of each softmax's mass, float32 [B, N]; 0 and -inf without items.

    stats_IKSg  the top and the mass of each item and head; heads are padded to a multiple of 8
    """
    _, K, H, g = totals_IKHg.shape
    B, G = work.first_B.shape[0], num_heads // K
    starts = parts_of(H)
    form = Form(G, H, starts, max(1, 16 // (len(starts) * (g // 8))), sinks_N is not None)
    sinks_N = jnp.zeros(num_heads, jnp.float32) if sinks_N is None else sinks_N.astype(jnp.float32)
    sinks_Kg = jnp.pad(sinks_N.reshape(K, G), ((0, 0), (0, g - G)))
    o_BNH, lse_BKg = plgpu.kernel(
        functools.partial(body, form=form),
        out_type=[jax.ShapeDtypeStruct((B, num_heads, H), dtype), jax.ShapeDtypeStruct((B, K, g), jnp.float32)],
        scratch_types=[plgpu.SMEM((g, H), dtype)],
        grid=(B, K),
        grid_names=("row", "head"),
        num_threads=1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
    )(totals_IKHg, stats_IKSg, sinks_Kg, work.first_B, work.items_B)
    return o_BNH, lse_BKg[..., :G].reshape(B, num_heads)


def body(totals, stats, sinks, first_item, num_items, o, lse, o_smem, *, form: Form):
    """One row and kv head."""
    row, head = lax.axis_index("row"), lax.axis_index("head")
    first, count = first_item[row], num_items[row]
    g = o_smem.shape[0]
    of_Hg, of_g = L.WGMMA, L.WGMMA.reduce(0)

    def wide(x_g):
        return lax.broadcast_in_dim(x_g, (ROWS, g), [1])

    def some(turn, carry):
        parts, top_g, mass_g = carry
        indices = [turn * form.together + j for j in range(form.together)]
        items = [first + jnp.minimum(index, count - 1) for index in indices]
        tops = [load(stats.at[i, head, 0], of_g, optimized=False) for i in items]
        tops = [jnp.where(index < count, top, NOTHING) for index, top in zip(indices, tops, strict=True)]
        new_g = functools.reduce(jnp.maximum, tops, top_g)
        keep_g = jnp.exp2(top_g - new_g)
        parts, mass_g = [part * wide(keep_g) for part in parts], mass_g * keep_g
        for i, item_top_g in zip(items, tops, strict=True):
            share_g = jnp.exp2(item_top_g - new_g)
            mass_g += share_g * load(stats.at[i, head, 1], of_g, optimized=False)
            for at, start in enumerate(form.starts):
                total_Hg = load(totals.at[i, head, pl.ds(start, ROWS)], of_Hg, optimized=False)
                parts[at] += wide(share_g) * total_Hg
        return parts, new_g, mass_g

    nothing = plgpu.layout_cast(jnp.zeros((ROWS, g), jnp.float32), of_Hg)
    top_g = plgpu.layout_cast(jnp.full((g,), NOTHING, jnp.float32), of_g)
    carry = ([nothing] * len(form.starts), top_g, plgpu.layout_cast(jnp.zeros((g,), jnp.float32), of_g))
    turns = lax.div(count + (form.together - 1), form.together)
    parts, top_g, mass_g = lax.fori_loop(0, turns, some, carry)
    if form.sinks:
        sink_g = load(sinks.at[head], of_g, optimized=False) * (1 / LN_2)
        new_g = jnp.maximum(top_g, sink_g)
        keep_g = jnp.exp2(top_g - new_g)
        parts = [part * wide(keep_g) for part in parts]
        top_g, mass_g = new_g, mass_g * keep_g + jnp.exp2(sink_g - new_g)
    live_g = mass_g > 0
    if form.sinks:
        live_g &= count > 0
    inverse_g = jnp.where(live_g, 1 / mass_g, 0.0)
    for start, part in zip(form.starts, parts, strict=True):
        out_Hg = plgpu.layout_cast((part * wide(inverse_g)).astype(o_smem.dtype), L.WGMMA_TRANSPOSED)
        o_smem.at[:, pl.ds(start, ROWS)].transpose((1, 0))[...] = out_Hg
    lse.at[row, head][...] = jnp.where(live_g, top_g * LN_2 + jnp.log2(mass_g) * LN_2, -jnp.inf)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(o_smem.at[pl.ds(0, form.group)], o.at[row, pl.ds(head * form.group, form.group)])
    plgpu.wait_smem_to_gmem(0)
