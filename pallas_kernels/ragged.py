"""Attention of any mix of rows: rows with one token and rows with many go their own ways.

    count 1   decode: tiles of all rows in one list, since one token's dot is too thin to wait for its row
    count > 1 chunks: query tiles, whose dots are thick

Both turn as often as there is work; a step without chunks never enters the second.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.rows import Rows, owners

Attend = Callable[..., tuple[jax.Array, jax.Array]]


def mixed(
    decode: Attend, chunks: Attend, q_TNH: jax.Array, k, v, rows: Rows, **shared
) -> tuple[jax.Array, jax.Array]:
    """`decode` serves the rows with one token, `chunks` those with more; outputs [T, N, H] and [T, N], float32."""
    o_BNH, lse_BN = single(decode, q_TNH[rows.first_B], k, v, rows, **shared)
    many = rows._replace(count_B=jnp.where(rows.count_B == 1, 0, rows.count_B))
    row_T, _, live_T = owners(rows, q_TNH.shape[0])
    nothing = jnp.zeros((), o_BNH.dtype), jnp.full((), -jnp.inf)
    one = _choose(live_T, (o_BNH[row_T], lse_BN[row_T]), nothing)
    return _choose(live_T & (many.count_B[row_T] > 0), chunks(q_TNH, k, v, many, **shared), one)


def single(decode: Attend, q_BNH: jax.Array, k, v, rows: Rows, **shared) -> tuple[jax.Array, jax.Array]:
    """`decode` serves the rows with one token, of which q_BNH are the queries; other rows give 0 and -inf."""
    lengths_B = jnp.where(rows.count_B == 1, rows.start_B + 1, 0)
    return decode(q_BNH, k, v, rows.table_BM, lengths_B, **shared)


def _choose(first_T: jax.Array, first: tuple[jax.Array, jax.Array], second: tuple[jax.Array, jax.Array]):
    o_TNH = jnp.where(first_T[:, None, None], first[0], second[0])
    return o_TNH, jnp.where(first_T[:, None], first[1], second[1])
