"""Join what the splits of a row found into its output, as a Pallas kernel through the Triton lowering.

    split x      totals_xH, top_x, mass_x           softmax over its own positions, in base 2, not yet divided
    top          max of top_x and the sink          share_x = 2^(top_x - top)
    mass         sum of share_x * mass_x, and 2^(sink - top)
    o_H          sum of share_x * totals_xH / mass  lse = (top + log2 mass) * ln 2

One program serves one query head of one row, AT_ONCE splits at a time.
Cost: the partial results once; one launch, where XLA makes two to three of it.
Source: FlashDecoding.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pl_triton

from pallas_kernels.numerics import LN_2

AT_ONCE = 16


def merge(
    totals_XBNH: jax.Array,
    tops_XBN: jax.Array,
    masses_XBN: jax.Array,
    sinks_N: jax.Array | None,
    lengths_B: jax.Array,
    *,
    unit: float,
    interpret: bool,
) -> tuple[jax.Array, jax.Array]:
    """Outputs [B, N, H] and the log of the mass [B, N]; 0 and -inf for rows of length 0.

    Tops are in units of `unit` powers of two. Splits that saw nothing have mass 0.
    """
    _, B, N, H = totals_XBNH.shape
    return tuple(
        pl.pallas_call(
            functools.partial(one_head, unit=unit),
            grid=(N, B),
            out_shape=[jax.ShapeDtypeStruct((B, N, H), jnp.float32), jax.ShapeDtypeStruct((B, N), jnp.float32)],
            compiler_params=pl_triton.CompilerParams(num_warps=2, num_stages=2),
            interpret=interpret,
            name="triton_merge",
        )(totals_XBNH, tops_XBN, masses_XBN, sinks_N, lengths_B)
    )


def one_head(totals, tops, masses, sinks, lengths, o_ref, lse_ref, *, unit: float):
    """One program: one query head of one row."""
    head, row = pl.program_id(0), pl.program_id(1)
    num_splits, _, _, H = totals.shape
    column_h = jnp.arange(pl.next_power_of_2(H), dtype=jnp.int32)
    within_x = jnp.arange(AT_ONCE, dtype=jnp.int32)

    def join(group, state):
        total_h, top, mass = state
        split_x = group * AT_ONCE + within_x
        live_x = split_x < num_splits
        top_x = pl_triton.load(tops.at[split_x, row, head], mask=live_x, other=-jnp.inf) * unit
        mass_x = pl_triton.load(masses.at[split_x, row, head], mask=live_x, other=0.0)
        where = totals.at[split_x[:, None], row, head, column_h[None]]
        total_xh = pl_triton.load(where, mask=live_x[:, None] & (column_h < H)[None], other=0.0)
        new_top = jnp.maximum(top, jnp.max(top_x))
        keep, share_x = jnp.exp2(top - new_top), jnp.exp2(top_x - new_top)
        total_h = total_h * keep + jnp.sum(share_x[:, None] * total_xh, axis=0)
        return total_h, new_top, mass * keep + jnp.sum(share_x * mass_x)

    nothing = (jnp.float32(-1e30), jnp.float32(0)) if sinks is None else (sinks[head] / LN_2, jnp.float32(1))
    state = (jnp.zeros(column_h.shape, jnp.float32), *nothing)
    total_h, top, mass = lax.fori_loop(0, pl.cdiv(num_splits, AT_ONCE), join, state)
    live = lengths[row] > 0
    o_h = jnp.where(live, total_h / jnp.where(live, mass, 1.0), 0.0)
    pl_triton.store(o_ref.at[row, head, column_h], o_h, mask=column_h < H)
    lse_ref[row, head] = jnp.where(live, top * LN_2 + jnp.log(mass), -jnp.inf)
