"""Writing the keys and values of a step into the blocks of a pool, and copying blocks.

    token t  ->  [slots_T[t], :, offsets_T[t], :] of both pools          slots and offsets of all tokens at once
    block    ->  block                                                   all heads, all positions

Cost: the new tokens, or the copied blocks, alone. Under donation the scatter happens in place; a bfloat16 pool is
held as uint16 on CPU, where XLA would convert a whole bfloat16 pool to float32 and back for one scatter.
XLA fuses the scatter with what makes its numbers (bias, norm, rotation, rounding to 8 bits): a kernel of its
own would be a launch more (README.md, "Tried and rejected").
"""

import jax
import jax.numpy as jnp

from pallas_kernels.pools import Pool, Scaled, as_stored, quantise


def write_kv(
    k: Pool, v: Pool, k_TKH: jax.Array, v_TKH: jax.Array, slots_T: jax.Array, offsets_T: jax.Array
) -> tuple[Pool, Pool]:
    """Put token t at [slots_T[t], :, offsets_T[t], :] of both pools and return them.

    slots_T    block indices in the whole pool, layer included; one at or past its size drops the token.
               Negative ones are forbidden: jax counts them from the end
    offsets_T  positions within the block
    """
    at = (slots_T, slice(None), offsets_T)
    if not isinstance(k, Scaled):
        return _put(k, at, as_stored(k_TKH, k.dtype)), _put(v, at, as_stored(v_TKH, v.dtype))
    numbers_TKH, scales_TK = quantise(k_TKH, k.numbers.dtype)
    k = Scaled(_put(k.numbers, at, numbers_TKH), _put(k.scales_PKC, at, scales_TK))
    numbers_TKH, scales_TK = quantise(v_TKH, v.numbers.dtype)
    turned = (slots_T, slice(None), slice(None), offsets_T)
    return k, Scaled(_put(v.numbers, turned, numbers_TKH), _put(v.scales_PKC, at, scales_TK))


def copy_blocks(k: Pool, v: Pool, sources_X: jax.Array, targets_X: jax.Array) -> tuple[Pool, Pool]:
    """Copy whole blocks sources_X[x] to targets_X[x] of both pools; a target at or past their size is dropped.

    All sources are read before any target is written. Targets must differ and none may be negative.
    """

    def copy(array: jax.Array) -> jax.Array:
        return _put(array, (targets_X,), array.at[sources_X].get(mode="clip"))

    return jax.tree.map(copy, k), jax.tree.map(copy, v)


def _put(array: jax.Array, at: tuple, numbers: jax.Array) -> jax.Array:
    return array.at[at].set(jnp.asarray(numbers, array.dtype), mode="drop")
