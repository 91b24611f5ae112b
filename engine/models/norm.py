"""RMSNorm over the last axis: x / sqrt(mean(x^2) + eps) * weight.

Computed in float32 and rounded to x's dtype before the weight is applied, as transformers does it. In 'invariant'
mode the sum of squares is a tree, so that a row has the same bits in any batch.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.dispatch import Numerics
from pallas_kernels.numerics import tree_sum


def rms_norm(x: jax.Array, weight: jax.Array, eps: float, numerics: Numerics) -> jax.Array:
    """The norm of every row (or head) of x, in x's dtype; `weight` has the length of its last axis."""
    x32 = x.astype(jnp.float32)
    squares = x32 * x32
    total = tree_sum(squares, keepdims=True) if numerics == "invariant" else jnp.sum(squares, -1, keepdims=True)
    return weight * (x32 * lax.rsqrt(total / x.shape[-1] + eps)).astype(x.dtype)
