"""What softmaxes in parts share: the cap of scores, precise products, and the end, where a sink joins.

A part knows its largest score (top), the sum of exp(score - top) (mass) and that of the weighted values (total).
"""

import jax
import jax.numpy as jnp
from jax import lax


def cap(scores: jax.Array, soft_cap: float | None) -> jax.Array:
    """Scores bent so that they stay within +-soft_cap."""
    return scores if soft_cap is None else soft_cap * jnp.tanh(scores / soft_cap)


def product(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """An einsum summed in float32. float32 operands are not rounded to what tensor cores like."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.einsum(equation, a, b, precision=precision, preferred_element_type=jnp.float32)


def finish(
    total_XNH: jax.Array, top_XN: jax.Array, mass_XN: jax.Array, sinks_N: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Outputs [X, N, H] and the log of the mass [X, N], the sink included; 0 and -inf where nothing was seen."""
    saw_XN = mass_XN > 0
    if sinks_N is not None:
        sinks_N = sinks_N.astype(jnp.float32)
        old_XN, top_XN = top_XN, jnp.maximum(top_XN, sinks_N)
        keep_XN = jnp.exp(old_XN - top_XN)
        total_XNH = total_XNH * keep_XN[..., None]
        mass_XN = mass_XN * keep_XN + jnp.exp(sinks_N - top_XN)
    o_XNH = total_XNH / jnp.where(saw_XN, mass_XN, 1)[..., None]
    lse_XN = jnp.where(saw_XN, top_XN + jnp.log(jnp.where(saw_XN, mass_XN, 1)), -jnp.inf)
    return o_XNH, lse_XN
