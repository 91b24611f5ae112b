"""Which tokens may be drawn: min_p, top_k and top_p over the whole vocabulary, without a sort.

top_k and top_p both keep the smallest upper set (all tokens above a threshold) that reaches a goal: a count of k,
or a share p of the mass. The threshold is found by bisection over the integers whose order is that of float32, so
the answer is exact and equal logits stand or fall together:

    top_k  keeps a token iff fewer than k tokens have a greater logit (ties at the k-th value stay)
    top_p  keeps a token iff the mass of those more probable is less than p of what min_p and top_k left; the best
           stays, and tokens that are equally probable in float32 stand or fall together

Cost: each halving is one count over [B, V], and for top_p one masked tree sum; a row is done when one token is left
between the bounds, after about 10 halvings when the set is small and 20 when it is large, 52 at most. Rows share
the loop but not the answer. A loop reads few arrays, since two of 16 x 151936 outgrow a CPU's cache: there, on one
core, a turn takes 0.3 ms for top_k and 1.4 for top_p; a sort takes 1,700.
Source: order and formulas of vLLM's sampler; the bisection is ours.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.numerics import tree_sum

NEVER = -(2**31) + 2**23 - 1  # image of -inf: 0xff800000 with its lower 31 bits flipped
ONE = 127 << 23  # image of 1.0
BY_VALUE = 20  # halvings of the interval of values before those of the integers, which end the search
SPAN = 32.0  # logits below the best to look at first


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
    by_value_B = jnp.where(low_B > NEVER, 0.5 * value(low_B) + 0.5 * value(high_B), value(high_B) - SPAN)
    by_image_B = (low_B & high_B) + ((low_B ^ high_B) >> 1)
    return jnp.clip(jnp.where(turn < BY_VALUE, image(by_value_B), by_image_B), low_B + 1, high_B - 1)


def _count(set_BV: jax.Array) -> jax.Array:
    """How many are true in each row; halves are added first, which on CPU is five times as fast as a reduce."""
    count_BV, width = set_BV.astype(jnp.int32), set_BV.shape[1]
    while width > 1 and width % 2 == 0:
        width //= 2
        count_BV = count_BV[:, :width] + count_BV[:, width:]
    return jnp.sum(count_BV, 1)


def _threshold(
    image_BV: jax.Array,
    start: Bounds,
    reaches: Callable[[jax.Array, jax.Array], jax.Array],
    first_turn: int,
) -> jax.Array:
    """The highest image [B] above which the tokens still reach the goal; where `start` is closed, its `low_B`.

    reaches     from images [B] and the counts of tokens above them, whether those reach their row's goal; monotone
    first_turn  BY_VALUE to halve by image alone, for values as unlike in size as probabilities are
    """

    def halve(state):
        bounds, turn = state
        middle_B = _middle(bounds, turn)
        count_B = _count(image_BV > middle_B[:, None])
        enough_B = reaches(middle_B, count_B)
        up_B, down_B = _open(bounds) & enough_B, _open(bounds) & ~enough_B
        return Bounds(
            jnp.where(up_B, middle_B, bounds.low_B),
            jnp.where(down_B, middle_B, bounds.high_B),
            jnp.where(up_B, count_B, bounds.above_low_B),
            jnp.where(down_B, count_B, bounds.above_high_B),
        ), turn + 1

    bounds, _ = lax.while_loop(lambda state: jnp.any(_open(state[0])), halve, (start, jnp.int32(first_turn)))
    return bounds.low_B


def _top_k(x_BV: jax.Array, most_B: jax.Array, top_k_B: jax.Array) -> jax.Array:
    """Image [B] of logits that the kept ones are above."""
    none_B = jnp.full_like(top_k_B, NEVER)

    def search(x_BV):
        finite_B = _count(x_BV > -jnp.inf)
        goal_B = jnp.minimum(top_k_B, finite_B)
        high_B = jnp.where(top_k_B > 0, image(most_B), NEVER)
        start = Bounds(none_B, high_B, finite_B, jnp.zeros_like(none_B))
        return _threshold(image(x_BV), start, lambda _, count_B: count_B >= goal_B, 0)

    return lax.cond(jnp.any(top_k_B > 0), search, lambda _: none_B, x_BV)


def _top_p(weight_BV: jax.Array, top_p_B: jax.Array) -> jax.Array:
    """Image [B] of weights that the kept ones are above.

    Weights are read out of their images (not negative, they are the same bits), padded to a power of two before the
    loop: the sum would do so in every turn, at three times its cost.
    """
    none_B = jnp.full(top_p_B.shape, -1, jnp.int32)

    def search(weight_BV):
        width = weight_BV.shape[1]
        image_BV = image(weight_BV)
        wide_BV = jnp.pad(image_BV, ((0, 0), (0, (1 << (width - 1).bit_length()) - width)))
        goal_B = top_p_B * tree_sum(weight_BV)

        def heavy(middle_B, _):
            above_BV = jnp.where(wide_BV > middle_B[:, None], wide_BV, 0)
            return tree_sum(lax.bitcast_convert_type(above_BV, jnp.float32)) >= goal_B

        high_B = jnp.where(top_p_B < 1, ONE, none_B)
        start = Bounds(none_B, high_B, jnp.full_like(none_B, width), jnp.zeros_like(none_B))
        return _threshold(image_BV, start, heavy, BY_VALUE)

    return lax.cond(jnp.any(top_p_B < 1), search, lambda _: none_B, weight_BV)


def kept(
    x_BV: jax.Array,
    most_B: jax.Array,
    degrees_B: jax.Array,
    top_k_B: jax.Array,
    top_p_B: jax.Array,
    min_p_B: jax.Array,
) -> jax.Array:
    """bool [B, V]: tokens that min_p, then top_k, then top_p leave.

    x_BV       logits; -inf is never kept
    most_B     the greatest of each row
    degrees_B  temperatures, above 0
    The weight of a token is its probability over that of the best, 0..1; equal weights stand or fall together.
    """
    weight_BV = jnp.exp((x_BV - most_B[:, None]) / degrees_B[:, None])
    above_BV = image(x_BV) > _top_k(x_BV, most_B, top_k_B)[:, None]
    left_BV = (weight_BV >= min_p_B[:, None]) & above_BV
    return left_BV & (image(weight_BV) > _top_p(jnp.where(left_BV, weight_BV, 0.0), top_p_B)[:, None])
