"""The one door to products with quantised weights: weight-only or dynamic, and who computes them.

    weight-only   x_TD . (numbers widened inside the product) * scales
    dynamic       (x_TD rounded to 8 bits, a scale a token) . numbers -> int32 or float32, * both scales

Dynamic products read as little and multiply faster; int8 is off by about 1% of the largest output, float8_e4m3fn,
which has three bits of mantissa, by about 3%.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.quantised import PerColumn, Quantised, check, rounded
from pallas_kernels.target import CPU, Target
from pallas_kernels.xla import matmul as xla


def matmul(x_TD: jax.Array, w: Quantised, *, dynamic: bool = False, target: Target = CPU) -> jax.Array:
    """x times the weights that `w` stands for; float32 [T, X].

    dynamic   x is rounded to 8 bits a token first, floating where the weights are: faster, off by up to 1%
    target    what is compiled for
    Raises ValueError, while tracing, where x and w do not fit each other or w's own arrays do not.
    """
    check(x_TD, w)
    if dynamic:
        floating = isinstance(w, PerColumn) and w.numbers_XD.dtype == jnp.float8_e4m3fn
        q_TD, scale_T1 = rounded(x_TD.astype(jnp.float32), "fp8" if floating else "int8")
        return xla.matmul(q_TD, w, target) * scale_T1
    return xla.matmul(x_TD, w, target)
