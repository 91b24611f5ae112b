"""What a pool of keys or values is: plain numbers, or 8-bit numbers with a scale for each token and head.

    plain    k_PKCH, v_PKCH             float32, float16, bfloat16 (held as uint16 on CPU)
    scaled   k_PKCH, v_PKHC + s_PKC     int8 or float8_e4m3fn; float32 scales; number = stored * scale

8-bit values are stored with positions last, because a Hopper tensor core takes 8-bit operands only with the axis
that is summed over (for values, positions) last. The scale of a token is its largest magnitude over the largest
number of the dtype, so that nothing overflows; a token of zeros has scale 1.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

SCALE_BYTES = 4


class Scaled(NamedTuple):
    """A pool of 8-bit numbers."""

    numbers: jax.Array  # keys [P, K, C, H], values [P, K, H, C]
    scales_PKC: jax.Array


Pool = jax.Array | Scaled


def geometry(k: Pool) -> tuple[int, int, int, int]:
    """P, K, C, H of a pool of keys."""
    return (k.numbers if isinstance(k, Scaled) else k).shape


def keys_at(k: Pool, blocks_X: jax.Array) -> jax.Array:
    """Numbers [X, K, C, H] of blocks, float32 from a scaled pool; wild block numbers are clamped, not followed."""
    if isinstance(k, Scaled):
        return _at(k.numbers, blocks_X).astype(jnp.float32) * _at(k.scales_PKC, blocks_X)[..., None]
    return as_numbers(_at(k, blocks_X))


def values_at(v: Pool, blocks_X: jax.Array) -> jax.Array:
    """`keys_at` of a pool of values."""
    if not isinstance(v, Scaled):
        return keys_at(v, blocks_X)
    v_XKHC = _at(v.numbers, blocks_X).astype(jnp.float32) * _at(v.scales_PKC, blocks_X)[:, :, None]
    return v_XKHC.swapaxes(2, 3)


def _at(array: jax.Array, blocks_X: jax.Array) -> jax.Array:
    return array.at[blocks_X].get(mode="clip", wrap_negative_indices=False)


def quantise(x_TKH: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """Numbers of `dtype` [T, K, H] and their scales, float32 [T, K]."""
    largest = 127.0 if dtype == jnp.int8 else float(jnp.finfo(dtype).max)
    x_TKH = x_TKH.astype(jnp.float32)
    top_TK = jnp.max(jnp.abs(x_TKH), axis=-1)
    scale_TK = jnp.where(top_TK > 0, top_TK / largest, 1.0)
    x_TKH = jnp.clip(x_TKH / scale_TK[..., None], -largest, largest)
    return (jnp.round(x_TKH) if dtype == jnp.int8 else x_TKH).astype(dtype), scale_TK


def as_numbers(x: jax.Array) -> jax.Array:
    """Pool contents as numbers: bfloat16 is held as uint16 where XLA would widen a bfloat16 scatter."""
    return lax.bitcast_convert_type(x, jnp.bfloat16) if x.dtype == jnp.uint16 else x


def as_stored(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Numbers as a plain pool of `dtype` holds them; the inverse of `as_numbers`."""
    return lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16) if dtype == jnp.uint16 else x.astype(dtype)
