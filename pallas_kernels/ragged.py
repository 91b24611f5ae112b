"""Attention of any mix of rows, in XLA: rows with one token and rows with many go their own ways.

    count 1   `decode`: tiles of all rows in one list, since one token's dot is too thin to wait for its row
    count > 1 `chunks`: query tiles, whose dots are thick

Both loops turn as often as there is work; a step without chunks never enters the second.
"""

import jax
import jax.numpy as jnp

from pallas_kernels import chunks, decode
from pallas_kernels.rows import Rows, owners


def attention(
    q_TNH: jax.Array,
    k_PKCH: jax.Array,
    v_PKCH: jax.Array,
    rows: Rows,
    *,
    base: int | jax.Array,
    scale: float,
    window: int | None,
    one_token: bool,
    platform: str,
) -> jax.Array:
    """Equals `reference.attention` up to the order of its sums. one_token promises that no count is above 1."""
    T = q_TNH.shape[0]
    row_T, _, live_T = owners(rows, T)
    single_B = rows.count_B == 1
    shared = {"base": base, "scale": scale, "window": window, "platform": platform}
    lengths_B = jnp.where(single_B, rows.start_B + 1, 0)
    o_BNH = decode.attend(q_TNH[rows.first_B], k_PKCH, v_PKCH, rows.table_BM, lengths_B, **shared)
    o_TNH = o_BNH[row_T]
    if not one_token:
        many = rows._replace(count_B=jnp.where(single_B, 0, rows.count_B))
        o_chunk_TNH = chunks.attend(q_TNH, k_PKCH, v_PKCH, many, **shared)
        o_TNH = jnp.where(single_B[row_T][:, None, None], o_TNH, o_chunk_TNH)
    return jnp.where(live_T[:, None, None], o_TNH, 0).astype(q_TNH.dtype)
