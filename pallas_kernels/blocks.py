"""Writing the keys and values of a step into the blocks of a pool.

Cost: the new tokens alone. Under donation the scatter happens in place; a bfloat16 pool is held as
uint16 on CPU, where XLA would convert a whole bfloat16 pool to float32 and back for one scatter.
"""

import jax

from pallas_kernels.pools import as_stored


def write_kv(
    k_PKCH: jax.Array,
    v_PKCH: jax.Array,
    k_TKH: jax.Array,
    v_TKH: jax.Array,
    slots_T: jax.Array,
    offsets_T: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Put token t at [slots_T[t], :, offsets_T[t], :] of both pools and return them.

    slots_T    block indices in the whole pool, layer included; one at or past its size drops the token.
               Negative ones are forbidden: jax counts them from the end
    offsets_T  positions within the block
    """
    k_PKCH = k_PKCH.at[slots_T, :, offsets_T].set(as_stored(k_TKH, k_PKCH.dtype), mode="drop")
    v_PKCH = v_PKCH.at[slots_T, :, offsets_T].set(as_stored(v_TKH, v_PKCH.dtype), mode="drop")
    return k_PKCH, v_PKCH
