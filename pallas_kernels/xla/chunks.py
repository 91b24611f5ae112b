"""Attention of rows with several tokens each (chunks of prompts, drafts to verify), in XLA.

Each row's tokens are cut into query tiles of t tokens, each query tile meets the tiles of s positions it
can see, in order, with a running softmax:

    row 0, tokens 4..9 of 10        positions  0..3  4..7  8..11
        query tile 4..7                         |##|  |\\ |            t = s = 4: the diagonal ends the row
        query tile 8..9                         |##|  |##|  |\\

Cost: t * G rows to every dot, so keys and values are read count / t times; tiles past the diagonal, before
the window and of other rows are never visited. One query tile at a time is in memory.
Source: FlashAttention's order of loops, over blocks.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.numerics import NOTHING
from pallas_kernels.pools import Pool, geometry, keys_at, values_at
from pallas_kernels.rows import Rows
from pallas_kernels.xla.softmax import cap, finish, product

QUERY_TILE = 64
TILE = 128  # positions, unless a block is longer


class Running(NamedTuple):
    """Softmax so far of one query tile; the G heads of a kv head and the t tokens are one axis Gt."""

    total_KGtH: jax.Array
    top_KGt: jax.Array
    mass_KGt: jax.Array


def attend(
    q_TNH: jax.Array,
    k: Pool,
    v: Pool,
    rows: Rows,
    *,
    base: int | jax.Array,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    sinks_N: jax.Array | None,
    platform: str,
) -> tuple[jax.Array, jax.Array]:
    """Each token of a row sees the row's positions up to its own.

    Returns outputs [T, N, H] and the log of each softmax's mass [T, N], in float32. What stands in the places of
    tokens that belong to no row is undefined.
    """
    T, N, H = q_TNH.shape
    _, K, C, _ = geometry(k)
    t = min(QUERY_TILE, 1 << max(T - 1, 0).bit_length())
    m = max(1, min(TILE // C, rows.table_BM.shape[1]))
    s = m * C
    blocks_BM = jnp.pad(rows.table_BM + base, ((0, 0), (0, -rows.table_BM.shape[1] % m)))
    wide = jnp.float32 if platform == "cpu" else q_TNH.dtype
    q_TNH = jnp.pad((q_TNH.astype(jnp.float32) * scale).astype(wide), ((0, t), (0, 0), (0, 0)))
    end_B = jnp.cumsum(-(-rows.count_B // t))

    def query_tile(carry):
        index, o_TNH, lse_TN = carry
        row = jnp.sum(end_B <= index).astype(jnp.int32)
        within = t * (index - end_B[row]) + t * -(-rows.count_B[row] // t)  # tokens of the row before this tile
        token = rows.first_B[row] + within
        position_t = rows.start_B[row] + within + jnp.arange(t, dtype=jnp.int32)
        end = rows.start_B[row] + jnp.minimum(rows.count_B[row], within + t)
        q_tNH = lax.dynamic_slice_in_dim(q_TNH, token, t)
        q_KGtH = q_tNH.reshape(t, K, N // K, H).transpose(1, 2, 0, 3).reshape(K, -1, H)

        def tile(at, state):
            blocks_m = lax.dynamic_slice(blocks_BM, (row, at * m), (1, m))[0]
            position_s = at * s + jnp.arange(s, dtype=jnp.int32)
            seen_ts = (position_s <= position_t[:, None]) & (position_s < end)
            if window is not None:
                seen_ts &= position_s > position_t[:, None] - window
            k_mKCH, v_mKCH = (x_mKCH.astype(wide) for x_mKCH in (keys_at(k, blocks_m), values_at(v, blocks_m)))
            return meet(state, q_KGtH, k_mKCH, v_mKCH, seen_ts, soft_cap)

        rows_of_dot = N // K * t
        state = Running(
            jnp.zeros((K, rows_of_dot, H)), jnp.full((K, rows_of_dot), NOTHING), jnp.zeros((K, rows_of_dot))
        )
        begin = jnp.int32(0) if window is None else jnp.maximum(position_t[0] - window + 1, 0) // s
        state = lax.fori_loop(begin, -(-end // s), tile, state)
        total_tNH = state.total_KGtH.reshape(K, N // K, t, H).transpose(2, 0, 1, 3).reshape(t, N, H)
        top_tN, mass_tN = (x_KGt.reshape(N, t).T for x_KGt in (state.top_KGt, state.mass_KGt))
        o_tNH, lse_tN = finish(total_tNH, top_tN, mass_tN, sinks_N)
        # A short last tile runs over the next row's places, whose own tiles come later and win.
        o_TNH, lse_TN = (
            lax.dynamic_update_slice_in_dim(x, x_t, token, 0) for x, x_t in ((o_TNH, o_tNH), (lse_TN, lse_tN))
        )
        return index + 1, o_TNH, lse_TN

    # It starts as the queries: zeros, which depend on nothing, XLA makes for every layer before the first one runs.
    q_TNH = q_TNH.astype(jnp.float32)
    first = (jnp.int32(0), q_TNH, q_TNH[..., 0])
    _, o_TNH, lse_TN = lax.while_loop(lambda carry: carry[0] < end_B[-1], query_tile, first)
    return o_TNH[:T], lse_TN[:T]


def meet(
    state: Running,
    q_KGtH: jax.Array,
    k_mKCH: jax.Array,
    v_mKCH: jax.Array,
    seen_ts: jax.Array,
    soft_cap: float | None,
) -> Running:
    """Add one tile of positions to the running softmax of one query tile."""
    K, _, H = q_KGtH.shape
    t, s = seen_ts.shape
    seen_mC = jnp.any(seen_ts, axis=0).reshape(len(v_mKCH), -1)
    v_mKCH = jnp.where(seen_mC[:, None, :, None], v_mKCH, 0)  # what nobody sees may be NaN
    k_KsH, v_KsH = (x_mKCH.swapaxes(0, 1).reshape(K, s, H) for x_mKCH in (k_mKCH, v_mKCH))
    scores_KGts = cap(product("KqH,KsH->Kqs", q_KGtH, k_KsH), soft_cap)
    seen_qs = jnp.broadcast_to(seen_ts, (q_KGtH.shape[1] // t, t, s)).reshape(-1, s)
    scores_KGts = jnp.where(seen_qs, scores_KGts, NOTHING)
    top_KGt = jnp.maximum(state.top_KGt, jnp.max(scores_KGts, axis=-1))
    keep_KGt = jnp.exp(state.top_KGt - top_KGt)
    weights_KGts = jnp.where(seen_qs, jnp.exp(scores_KGts - top_KGt[..., None]), 0)
    added_KGtH = product("Kqs,KsH->KqH", weights_KGts.astype(v_KsH.dtype), v_KsH)
    return Running(
        state.total_KGtH * keep_KGt[..., None] + added_KGtH,
        top_KGt,
        state.mass_KGt * keep_KGt + jnp.sum(weights_KGts, axis=-1),
    )
