"""What attention over paged keys and values means, in the plainest jnp: the oracle of every kernel's test.

For each token: gather every block of its row's table, mask what it may not see, softmax, product.
Cost: T x M x C positions whatever the lengths are. Nothing here is meant to be fast.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.pools import as_numbers
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
) -> jax.Array:
    """Each token attends to positions max(0, p - window + 1)..p of its row; padded tokens give 0.

    Returns [T, N, H] in q's dtype, computed in float32. A pool of uint16 holds bfloat16.
    """
    _, K, C, H = k_PKCH.shape
    T, N, _ = q_TNH.shape
    row_T, position_T, live_T = owners(rows, T)

    def one_token(token):
        q_NH, row, position, live = token
        blocks_M = base + rows.table_BM[row]
        k_KSH = jnp.swapaxes(as_numbers(k_PKCH[blocks_M]), 0, 1).reshape(K, -1, H).astype(jnp.float32)
        v_KSH = jnp.swapaxes(as_numbers(v_PKCH[blocks_M]), 0, 1).reshape(K, -1, H).astype(jnp.float32)
        position_S = jnp.arange(blocks_M.shape[0] * C)
        seen_S = live & (position_S <= position)
        if window is not None:
            seen_S &= position_S > position - window
        q_KGH = q_NH.astype(jnp.float32).reshape(K, N // K, H)
        scores_KGS = scale * jnp.einsum("KGH,KSH->KGS", q_KGH, jnp.where(seen_S[:, None], k_KSH, 0))
        weights_KGS = jax.nn.softmax(jnp.where(seen_S, scores_KGS, -jnp.inf), axis=-1)
        weights_KGS = jnp.where(seen_S, weights_KGS, 0)  # a padded token has no positions: softmax gives NaN
        return jnp.einsum("KGS,KSH->KGH", weights_KGS, jnp.where(seen_S[:, None], v_KSH, 0)).reshape(N, H)

    return lax.map(one_token, (q_TNH, row_T, position_T, live_T)).astype(q_TNH.dtype)
