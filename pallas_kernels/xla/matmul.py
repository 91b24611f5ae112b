"""Products with quantised weights in XLA, in the forms that each platform computes best.

    cpu     int8 tokens       one integer product                                      0.4 to 0.8 of the time
            int8, <= 8 rows   each token as three rows of int8 digits, exactly         0.6 to 0.9
            all others        a loop over tiles of columns that widen in the cache     int8 0.8, int4 1, fp8 2 to 6
    others  int8, fp8         XLA widens inside its product; 8-bit tokens: 8-bit cores no copy of the weights
            int4, <= 32 rows  one product a group, scaled and added afterwards         a byte a weight, and sums
            int4, more rows   a copy of the weights in the dtype of x                  two bytes a weight

Times are beside one plain float32 product of the same matrix, which comes from memory (`python -m bench matmul`).
Rejected: widening all of a matrix before its product on CPU (2 to 9 times slower).
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.quantised import (
    GROUP,
    LARGEST,
    NOTHING,
    Grouped,
    PerColumn,
    Quantised,
    columns,
    halves,
    widened,
)
from pallas_kernels.target import Target

DIGIT_ROWS = 8
DIGIT = 254.0  # steps of one int8 digit that the next one divides
GROUPED_ROWS = 32
TILE_BYTES = 1 << 21  # of a widened tile, which must stay in the cache


def matmul(x_TD: jax.Array, w: Quantised, target: Target) -> jax.Array:
    """x, or its 8-bit numbers, times the weights; float32 [T, X]. Numbers of int8 meet weights of int8 alone."""
    cpu = target.platform == "cpu"
    if isinstance(w, Grouped):
        return _by_tiles(x_TD, w) if cpu else _by_groups(x_TD, w)
    if not cpu or x_TD.dtype == jnp.int8:
        return _contract(x_TD, w.numbers_XD.astype(x_TD.dtype), target) * w.scales_X
    if w.numbers_XD.dtype == jnp.int8 and x_TD.shape[0] <= DIGIT_ROWS:
        return _by_digits(x_TD, w, target)
    return _by_tiles(x_TD, w)


def _contract(x_TD: jax.Array, w_XD: jax.Array, target: Target) -> jax.Array:
    """Sums over D, in int32 for int8 numbers, as float32."""
    T = x_TD.shape[0]
    exact = x_TD.dtype == jnp.int8
    if target.platform == "cpu" and T == 1 and exact:
        x_TD = jnp.pad(x_TD, ((0, 1), (0, 0)))  # a product of one row of int8 takes three times as long as of two
    over = (((1,), (1,)), ((), ()))
    y_TX = lax.dot_general(x_TD, w_XD, over, preferred_element_type=jnp.int32 if exact else jnp.float32)
    return y_TX[:T].astype(jnp.float32)


def _by_digits(x_TD: jax.Array, w: PerColumn, target: Target) -> jax.Array:
    """Weight-only by integer products: each token becomes three rows of int8 digits, 22 bits of its largest number.

    Cost: an integer product of three times the rows, which for few rows is faster than any that widens the weights.
    """
    T, _ = x_TD.shape
    top_T1 = jnp.max(jnp.abs(x_TD.astype(jnp.float32)), axis=1, keepdims=True)
    scale_T1 = jnp.where(top_T1 <= NOTHING, 1.0, top_T1 / LARGEST["int8"])
    rest_TD, digits = x_TD.astype(jnp.float32) / scale_T1, []
    for _ in range(3):
        digits.append(jnp.round(rest_TD))
        rest_TD = (rest_TD - digits[-1]) * DIGIT
    y_TX = _contract(jnp.concatenate(digits).astype(jnp.int8), w.numbers_XD, target)
    y_TX = y_TX[:T] + (y_TX[T : 2 * T] + y_TX[2 * T :] / DIGIT) / DIGIT
    return y_TX * scale_T1 * w.scales_X


def _by_tiles(x_TD: jax.Array, w: Quantised) -> jax.Array:
    """Columns in tiles, each widened to float32 just before its product: XLA would widen all of them to memory."""
    (T, D), X = x_TD.shape, w.shape[1]
    x_TD = x_TD.astype(jnp.float32)
    tile = max(TILE_BYTES // (4 * D), 8)

    def one(part: Quantised) -> jax.Array:
        over = (((1,), (1,)), ((), ()))
        if isinstance(part, PerColumn):
            return lax.dot_general(widened(part), x_TD, over)  # the weights on the left: faster
        scales = jnp.repeat(part.scales_DX.T, GROUP // 2, axis=1)  # of pairs, which need not be put in a row
        low, high = (half.astype(jnp.float32) * scales for half in halves(part.pairs_XD))
        return lax.dot_general(low, x_TD[:, ::2], over) + lax.dot_general(high, x_TD[:, 1::2], over)

    def meet(i: jax.Array, y_XT: jax.Array) -> jax.Array:
        start = jnp.minimum(i * tile, X - tile)  # the last tile may do columns of the one before again
        return lax.dynamic_update_slice(y_XT, one(columns(w, start, tile)), (start, 0))

    if tile >= X:
        return one(w).T
    return lax.fori_loop(0, -(-X // tile), meet, jnp.zeros((X, T), jnp.float32)).T


def _by_groups(x_TD: jax.Array, w: Grouped) -> jax.Array:
    """Products of 4-bit numbers where XLA cannot scale a group inside its product, in the cheaper of two ways."""
    (T, D), X = x_TD.shape, w.shape[1]
    if T > GROUPED_ROWS:
        w_XD = widened(w).astype(x_TD.dtype)
        return lax.dot_general(x_TD, w_XD, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    pairs = w.pairs_XD.reshape(X, D // GROUP, GROUP // 2)
    x_by_pair = x_TD.reshape(T, D // GROUP, GROUP // 2, 2)
    over = (((2,), (2,)), ((1,), (1,)))  # a batch of groups
    y_DTX = sum(
        lax.dot_general(x_by_pair[..., i], half.astype(x_TD.dtype), over, preferred_element_type=jnp.float32)
        for i, half in enumerate(halves(pairs))
    )
    return jnp.sum(y_DTX * w.scales_DX[:, None], axis=0)
