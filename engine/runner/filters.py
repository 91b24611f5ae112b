"""Which tokens may be drawn: min_p, top_k and top_p over the whole vocabulary, without a sort.

top_k and top_p both keep the smallest upper set (all tokens above a threshold) that reaches a goal: a count of k,
or a share p of the mass. The threshold is found by bisection over the integers whose order is that of float32, so
the answer is exact and equal logits stand or fall together:

    top_k  keeps a token iff fewer than k tokens are strictly above it (ties at the k-th value stay)
    top_p  keeps a token iff the mass strictly above it is less than p of what min_p and top_k left; the best stays

Cost: each halving is one count over [B, V], and for top_p one masked tree sum; a row is done when one token is left
between the bounds, after about 10 halvings when the set is small and 20 when it is large, 52 at most. Rows share
the loop but not the answer. A sort of [16, 151936] takes 0.9 s on two CPU cores.
Source: order and formulas of vLLM's sampler; the bisection is ours.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.numerics import tree_sum

NEVER = -(2**31) + 2**23 - 1  # image of -inf: 0xff800000 with its lower 31 bits flipped
ALWAYS = 2**31 - 2**23  # image of +inf
BY_VALUE = 20  # halvings of the interval of values before those of the integers, which end the search


def image(x: jax.Array) -> jax.Array:
    """int32 whose order is that of float32 x; -0.0 and 0.0 are one value."""
    bits = lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def value(images: jax.Array) -> jax.Array:
    """The float32 of an image."""
    return lax.bitcast_convert_type(images ^ ((images >> 31) & 0x7FFFFFFF), jnp.float32)


class Bounds(NamedTuple):
    """The set above `low` reaches the goal and the set above `high` does not; each with its count of tokens."""

    low_B: jax.Array
    high_B: jax.Array
    above_low_B: jax.Array
    above_high_B: jax.Array


def _open(bounds: Bounds) -> jax.Array:
    apart_B = bounds.low_B + 1 < bounds.high_B
    return apart_B & (bounds.above_low_B - bounds.above_high_B > 1)


def _middle(bounds: Bounds, turn: jax.Array) -> jax.Array:
    """An image strictly between the bounds: half way by value at first, as logits are spread, then by image."""
    low_B, high_B = bounds.low_B, bounds.high_B
    by_value_B = image(0.5 * value(low_B) + 0.5 * value(high_B))
    by_image_B = (low_B & high_B) + ((low_B ^ high_B) >> 1)
    return jnp.clip(jnp.where(turn < BY_VALUE, by_value_B, by_image_B), low_B + 1, high_B - 1)


def upper_set(
    image_BV: jax.Array, on_B: jax.Array, reaches: Callable[[jax.Array, jax.Array], jax.Array]
) -> jax.Array:
    """bool [B, V]: the smallest set of tokens above a threshold that reaches the goal; everything where not `on_B`.

    reaches  from a set bool [B, V] and its count [B], whether it reaches its row's goal; monotone, and true of all
             tokens whose image is finite.
    """
    lowest_B = jnp.min(jnp.where(image_BV > NEVER, image_BV, ALWAYS), 1) - 1
    highest_B = jnp.max(image_BV, 1)
    count_B = jnp.sum(image_BV > lowest_B[:, None], 1, dtype=jnp.int32)
    start = Bounds(lowest_B, jnp.where(on_B, highest_B, lowest_B), count_B, jnp.zeros_like(count_B))

    def halve(state):
        bounds, turn = state
        middle_B = _middle(bounds, turn)
        above_BV = image_BV > middle_B[:, None]
        count_B = jnp.sum(above_BV, 1, dtype=jnp.int32)
        enough_B = reaches(above_BV, count_B)
        up_B, down_B = _open(bounds) & enough_B, _open(bounds) & ~enough_B
        return Bounds(
            jnp.where(up_B, middle_B, bounds.low_B),
            jnp.where(down_B, middle_B, bounds.high_B),
            jnp.where(up_B, count_B, bounds.above_low_B),
            jnp.where(down_B, count_B, bounds.above_high_B),
        ), turn + 1

    bounds, _ = lax.while_loop(lambda state: jnp.any(_open(state[0])), halve, (start, jnp.int32(0)))
    return ~on_B[:, None] | (image_BV > bounds.low_B[:, None])


def kept(
    x_BV: jax.Array, weight_BV: jax.Array, top_k_B: jax.Array, top_p_B: jax.Array, min_p_B: jax.Array
) -> jax.Array:
    """bool [B, V]: tokens that min_p, then top_k, then top_p leave.

    x_BV       logits; -inf is never kept by a filter that is on
    weight_BV  probability of each token over that of the best, 0..1; of logits divided by the temperature
    """
    image_BV = image(x_BV)
    possible_B = jnp.sum(x_BV > -jnp.inf, 1, dtype=jnp.int32)
    k_B = jnp.minimum(top_k_B, possible_B)
    keep_BV = (weight_BV >= min_p_B[:, None]) & upper_set(image_BV, top_k_B > 0, lambda _, count_B: count_B >= k_B)
    return keep_BV & _nucleus(jnp.where(keep_BV, image_BV, NEVER), jnp.where(keep_BV, weight_BV, 0.0), top_p_B)


def _nucleus(image_BV: jax.Array, weight_BV: jax.Array, top_p_B: jax.Array) -> jax.Array:
    """bool [B, V]: the smallest upper set that holds top_p of the weight.

    Padded to a power of two before the loop, which the sum would do in every turn at three times its cost.
    """
    width = weight_BV.shape[1]
    pad = ((0, 0), (0, (1 << (width - 1).bit_length()) - width))
    image_BV, weight_BV = jnp.pad(image_BV, pad, constant_values=NEVER), jnp.pad(weight_BV, pad)
    goal_B = top_p_B * tree_sum(weight_BV)

    def heavy(above_BV, _):
        return tree_sum(jnp.where(above_BV, weight_BV, 0.0)) >= goal_B

    return upper_set(image_BV, top_p_B < 1, heavy)[:, :width]
