"""What attention over paged keys and values means, in the plainest jnp: the oracle of every kernel's test.

For each token: gather every block of its row's table, mask what it may not see, softmax, product.
Cost: T x M x C positions whatever the lengths are. Nothing here is meant to be fast.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.pools import Pool, geometry, keys_at, values_at
from pallas_kernels.rows import Rows, owners


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
) -> tuple[jax.Array, jax.Array]:
    """Each token attends to positions max(0, p - window + 1)..p of its row; padded tokens give 0.

    A score is scale * q . k, then soft_cap * tanh(score / soft_cap) where there is a cap. A sink is a logit of a
    query head that joins the mass of the softmax and adds no value.
    Returns outputs [T, N, H] and the log of each softmax's mass, sink included, [T, N] (-inf for padded tokens), in
    float32.
    """
    _, K, C, H = geometry(k)
    T, N, _ = q_TNH.shape
    row_T, position_T, live_T = owners(rows, T)

    def one_token(token):
        q_NH, row, position, live = token
        blocks_M = base + rows.table_BM[row]
        k_KSH = jnp.swapaxes(keys_at(k, blocks_M), 0, 1).reshape(K, -1, H).astype(jnp.float32)
        v_KSH = jnp.swapaxes(values_at(v, blocks_M), 0, 1).reshape(K, -1, H).astype(jnp.float32)
        position_S = jnp.arange(blocks_M.shape[0] * C)
        seen_S = live & (position_S <= position)
        if window is not None:
            seen_S &= position_S > position - window
        q_KGH = q_NH.astype(jnp.float32).reshape(K, N // K, H)
        scores_KGS = scale * jnp.einsum("KGH,KSH->KGS", q_KGH, jnp.where(seen_S[:, None], k_KSH, 0))
        if soft_cap is not None:
            scores_KGS = soft_cap * jnp.tanh(scores_KGS / soft_cap)
        scores_NS = jnp.where(seen_S, scores_KGS.reshape(N, -1), -jnp.inf)
        all_NS = scores_NS if sinks_N is None else jnp.concatenate([scores_NS, sinks_N[:, None]], axis=1)
        lse_N = jnp.where(live, jax.nn.logsumexp(all_NS, axis=1), -jnp.inf)
        weights_NS = jnp.where(seen_S, jnp.exp(scores_NS - jnp.where(live, lse_N, 0)[:, None]), 0)
        v_KSH = jnp.where(seen_S[:, None], v_KSH, 0)
        return jnp.einsum("KGS,KSH->KGH", weights_NS.reshape(K, N // K, -1), v_KSH).reshape(N, H), lse_N

    return lax.map(one_token, (q_TNH, row_T, position_T, live_T))
