"""The one door to products with quantised weights: weight-only or dynamic, and who computes them.

    weight-only   x_TD . (numbers widened inside the product) * scales
    dynamic       (x_TD rounded to 8 bits, a scale a token) . numbers -> int32 or float32, * both scales

    4-bit groups on Hopper, bfloat16 or float16 tokens   -> mosaic.matmul   XLA would copy the weights in every step
    everything else                                      -> xla.matmul

Dynamic products read as little and multiply faster; int8 is off by about 1% of the largest output, float8_e4m3fn,
which has three bits of mantissa, by about 3%. For 4-bit weights tokens of 8 bits are a loss of precision alone.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.mosaic import matmul as mosaic
from pallas_kernels.quantised import Grouped, Quantised, check, rounded
from pallas_kernels.target import CPU, Target
from pallas_kernels.xla import matmul as xla


def matmul(x_TD: jax.Array, w: Quantised, *, dynamic: bool = False, target: Target = CPU) -> jax.Array:
    """x times the weights that `w` stands for; float32 [T, X].

    dynamic   x is rounded to 8 bits a token first, to floating numbers where the weights are such
    target    what is compiled for
    Raises ValueError, while tracing, where x and w do not fit each other or w's own arrays do not.
    """
    check(x_TD, w)
    if dynamic:
        floating = jax.tree.leaves(w)[0].dtype == jnp.float8_e4m3fn
        q_TD, scale_T1 = rounded(x_TD.astype(jnp.float32), "fp8" if floating else "int8")
        return _product(q_TD, w, target) * scale_T1
    return _product(x_TD, w, target)


def _product(x_TD: jax.Array, w: Quantised, target: Target) -> jax.Array:
    """x, or its 8-bit numbers, times the weights."""
    if isinstance(w, Grouped):
        x_TD = x_TD.astype(jnp.bfloat16) if x_TD.dtype == jnp.int8 else x_TD  # which holds them exactly
        if mosaic.unserved(target, x_TD, w) is None:
            return mosaic.matmul(x_TD, w, target=target)
    return xla.matmul(x_TD, w, target)
