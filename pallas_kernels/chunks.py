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

from pallas_kernels.pools import as_numbers
from pallas_kernels.rows import Rows

QUERY_TILE = 64
TILE = 128  # positions, unless a block is longer
NOTHING = -1e30


class Running(NamedTuple):
    """Softmax so far of one query tile; the G heads of a kv head and the t tokens are one axis Gt."""

    total_KGtH: jax.Array
    top_KGt: jax.Array
    mass_KGt: jax.Array


def attend(
    q_TNH: jax.Array,
    k_PKCH: jax.Array,
    v_PKCH: jax.Array,
    rows: Rows,
    *,
    base: int | jax.Array,
    scale: float,
    window: int | None,
    platform: str,
) -> jax.Array:
    """Each token of a row sees the row's positions up to its own. Returns [T, N, H] in float32.

    What stands in the places of tokens that belong to no row is undefined.
    """
    T, N, H = q_TNH.shape
    _, K, C, _ = k_PKCH.shape
    t = min(QUERY_TILE, 1 << max(T - 1, 0).bit_length())
    m = max(1, min(TILE // C, rows.table_BM.shape[1]))
    s = m * C
    blocks_BM = jnp.pad(rows.table_BM + base, ((0, 0), (0, -rows.table_BM.shape[1] % m)))
    wide = jnp.float32 if platform == "cpu" else as_numbers(k_PKCH[:0]).dtype
    q_TNH = jnp.pad((q_TNH.astype(jnp.float32) * scale).astype(wide), ((0, t), (0, 0), (0, 0)))
    end_B = jnp.cumsum(-(-rows.count_B // t))

    def query_tile(carry):
        index, o_TNH = carry
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
            k_mKCH, v_mKCH = (as_numbers(pool[blocks_m]).astype(wide) for pool in (k_PKCH, v_PKCH))
            written_mC = (position_s < end).reshape(m, C)
            return meet(state, q_KGtH, k_mKCH, v_mKCH, seen_ts, written_mC)

        rows_of_dot = N // K * t
        state = Running(
            jnp.zeros((K, rows_of_dot, H)), jnp.full((K, rows_of_dot), NOTHING), jnp.zeros((K, rows_of_dot))
        )
        begin = jnp.int32(0) if window is None else jnp.maximum(position_t[0] - window + 1, 0) // s
        state = lax.fori_loop(begin, -(-end // s), tile, state)
        o_KGtH = state.total_KGtH / jnp.where(state.mass_KGt > 0, state.mass_KGt, 1)[..., None]
        o_tNH = o_KGtH.reshape(K, N // K, t, H).transpose(2, 0, 1, 3).reshape(t, N, H)
        # A short last tile runs over the next row's places, whose own tiles come later and win.
        return index + 1, lax.dynamic_update_slice_in_dim(o_TNH, o_tNH, token, 0)

    # It starts as the queries: zeros, which depend on nothing, XLA makes for every layer before the first one runs.
    first = (jnp.int32(0), q_TNH.astype(jnp.float32))
    return lax.while_loop(lambda carry: carry[0] < end_B[-1], query_tile, first)[1][:T]


def meet(
    state: Running,
    q_KGtH: jax.Array,
    k_mKCH: jax.Array,
    v_mKCH: jax.Array,
    seen_ts: jax.Array,
    written_mC: jax.Array,
) -> Running:
    """Add one tile of positions to the running softmax of one query tile."""
    K, _, H = q_KGtH.shape
    t, s = seen_ts.shape
    v_mKCH = jnp.where(written_mC[:, None, :, None], v_mKCH, 0)  # unwritten places may hold NaN
    k_KsH, v_KsH = (x_mKCH.swapaxes(0, 1).reshape(K, s, H) for x_mKCH in (k_mKCH, v_mKCH))
    scores_KGts = jnp.einsum("KqH,KsH->Kqs", q_KGtH, k_KsH, preferred_element_type=jnp.float32)
    seen_qs = jnp.broadcast_to(seen_ts, (q_KGtH.shape[1] // t, t, s)).reshape(-1, s)
    scores_KGts = jnp.where(seen_qs, scores_KGts, NOTHING)
    top_KGt = jnp.maximum(state.top_KGt, jnp.max(scores_KGts, axis=-1))
    keep_KGt = jnp.exp(state.top_KGt - top_KGt)
    weights_KGts = jnp.where(seen_qs, jnp.exp(scores_KGts - top_KGt[..., None]), 0)
    added_KGtH = jnp.einsum(
        "Kqs,KsH->KqH", weights_KGts.astype(v_KsH.dtype), v_KsH, preferred_element_type=jnp.float32
    )
    return Running(
        state.total_KGtH * keep_KGt[..., None] + added_KGtH,
        top_KGt,
        state.mass_KGt * keep_KGt + jnp.sum(weights_KGts, axis=-1),
    )
