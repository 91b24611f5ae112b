"""Rotary position embedding: each head's halves are turned by an angle that grows with the position.

    pair i of a head (x_i, x_{i + H/2}) turns by position * frequency_i,  frequency_i = theta ** (-2i / H)

The kinds differ in how they lower the frequencies so that a context longer than that of pretraining is read:

    linear   all divided by `factor`
    llama3   long wavelengths divided, short ones kept, a linear blend of the two between
    yarn     the same blend along the dimensions, and cos and sin multiplied by `attention_factor`

Frequencies are numbers of the trace, computed in float64; angles, cos and sin are float32, once a step.
Source: RoFormer; YaRN (arXiv 2309.00071); the rope_type section of Llama 3.1's config.json.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from engine.models.config import Rope


def frequencies(rope: Rope, head_width: int) -> np.ndarray:
    """Angle per position of each of the H/2 pairs; float32 [H/2]."""
    plain = rope.theta ** (-np.arange(0, head_width, 2, dtype=np.float64) / head_width)
    slow = plain / rope.factor
    if rope.kind == "llama3":
        kept = _kept_llama3(rope, plain)
    elif rope.kind == "yarn":
        kept = _kept_yarn(rope, head_width)
    else:
        kept = np.zeros_like(plain)  # linear, and default with factor 1
    return (slow * (1 - kept) + plain * kept).astype(np.float32)


def _kept_llama3(rope: Rope, plain: np.ndarray) -> np.ndarray:
    """Share of the plain frequency: 1 where the context of pretraining holds `high` turns, 0 below `low`."""
    turns = rope.original_context * plain / (2 * math.pi)
    return np.clip((turns - rope.low) / (rope.high - rope.low), 0, 1)


def _kept_yarn(rope: Rope, head_width: int) -> np.ndarray:
    """Share of the plain frequency: falls from 1 to 0 between the dimensions with `high` and `low` turns."""

    def dimension(turns: float) -> float:
        return head_width * math.log(rope.original_context / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    first, last = dimension(rope.high), dimension(rope.low)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_width - 1)
    last = last + 0.001 if last == first else last
    return 1 - np.clip((np.arange(head_width // 2) - first) / (last - first), 0, 1)


def angles(rope: Rope, head_width: int, positions_T: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos and sin of each token's turn; float32 [T, H/2] each."""
    angle_TH = positions_T.astype(jnp.float32)[:, None] * frequencies(rope, head_width)
    return jnp.cos(angle_TH) * rope.attention_factor, jnp.sin(angle_TH) * rope.attention_factor


def turn(x_TNH: jax.Array, cos_TH: jax.Array, sin_TH: jax.Array) -> jax.Array:
    """Turn the halves of every head; in x's dtype, cos and sin rounded to it first, as the oracle does."""
    cos, sin = (part[:, None, :].astype(x_TNH.dtype) for part in (cos_TH, sin_TH))
    left, right = jnp.split(x_TNH, 2, axis=-1)
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)
