"""Attention of any mix of rows, in XLA: rows with one token and rows with many go their own ways.

    count 1   `decode`: tiles of all rows in one list, since one token's dot is too thin to wait for its row
    count > 1 `chunks`: query tiles, whose dots are thick

Both loops turn as often as there is work; a step without chunks never enters the second.
"""

import functools
from collections.abc import Callable

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
    shared = {"base": base, "scale": scale, "window": window}
    one = functools.partial(decode.attend, platform=platform)
    o_TNH = decode_with(one, q_TNH, k_PKCH, v_PKCH, rows, **shared)
    if one_token:
        return o_TNH
    many = rows._replace(count_B=jnp.where(rows.count_B == 1, 0, rows.count_B))
    o_chunk_TNH = chunks.attend(q_TNH, k_PKCH, v_PKCH, many, platform=platform, **shared).astype(q_TNH.dtype)
    in_chunk_T = owners(many, q_TNH.shape[0]).live_T
    return jnp.where(in_chunk_T[:, None, None], o_chunk_TNH, o_TNH)


def decode_with(
    attend: Callable[..., jax.Array], q_TNH: jax.Array, k_PKCH: jax.Array, v_PKCH: jax.Array, rows: Rows, **shared
) -> jax.Array:
    """Let `attend` serve the rows with one token; every other token gives 0. Returns [T, N, H] in q's dtype."""
    lengths_B = jnp.where(rows.count_B == 1, rows.start_B + 1, 0)
    o_BNH = attend(q_TNH[rows.first_B], k_PKCH, v_PKCH, rows.table_BM, lengths_B, **shared)
    row_T, _, live_T = owners(rows._replace(count_B=(rows.count_B == 1).astype(jnp.int32)), q_TNH.shape[0])
    return jnp.where(live_T[:, None, None], o_BNH[row_T], 0).astype(q_TNH.dtype)
