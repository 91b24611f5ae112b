"""Products with quantised weights in XLA, in the forms that each platform computes best.

    cpu     int8 tokens       one integer product                                    0.4 to 0.8 of the time
            int8, <= 8 rows   each token as three rows of int8 digits, exactly       0.6 to 1
            all others        a loop over tiles of columns, widened in the cache     0.4 to 1.1, fp8 2 to 13
    others  int8, fp8         XLA widens inside its product, or multiplies in 8 bits no copy of the weights
            int4, <= 32 rows  one product a group, scaled and added afterwards       a byte a weight, and sums
            int4, more rows   a copy of the weights in the dtype of x                two bytes a weight

Times on CPU are beside one plain float32 product (`python -m bench matmul`: 1, 4 and 16 rows). The others compiled
for an H200, temporaries in MB of 4096 x 28672 (int8: 112 MB of weights, int4: 60) for 1, 8, 64, 256 tokens; with
XLA's Triton products, which is its default and fuses the widening, and with cuBLAS alone, which does not:

                    Triton                cuBLAS alone           what multiplies
    int8, fp8       0 0 0 0               452 229 235 252        mma of bfloat16
    int8 dynamic    0 1 7 28              0 5 11 29              mma of int8, or cuBLAS of int8
    fp8 dynamic     0 1 7 28              452 6 11 29            mma of float16, or cuBLAS of fp8
    int4            7 140 224 224         7 256 235 252          mma of bfloat16 after a copy; one row: a loop

Rejected: widening all of a matrix before its product on CPU (2 to 9 times slower); XLA's own conversion of fp8
there (3 times slower than from its bits); two digits a token (off by 3e-5); int4 as scales times numbers inside the
product, which XLA copies in seven ways of writing it; numbers with D first, which cuBLAS transposes (116 MB).
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
LAST = (((1,), (1,)), ((), ()))  # both operands are summed over their last axis


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
    y_TX = lax.dot_general(x_TD, w_XD, LAST, preferred_element_type=jnp.int32 if exact else jnp.float32)
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
    multiply = _tile_of_pairs if isinstance(w, Grouped) else _tile_of_numbers
    if isinstance(w, PerColumn) and w.numbers_XD.dtype == jnp.float8_e4m3fn:
        w, multiply = w._replace(numbers_XD=lax.bitcast_convert_type(w.numbers_XD, jnp.int8)), _tile_of_bits

    def meet(i: jax.Array, y_XT: jax.Array) -> jax.Array:
        start = jnp.minimum(i * tile, X - tile)  # the last tile may do columns of the one before again
        return lax.dynamic_update_slice(y_XT, multiply(columns(w, start, tile), x_TD), (start, 0))

    if tile >= X:
        return multiply(w, x_TD).T
    return lax.fori_loop(0, -(-X // tile), meet, jnp.zeros((X, T), jnp.float32)).T


def _tile_of_pairs(w: Grouped, x_TD: jax.Array) -> jax.Array:
    """Columns of 4-bit numbers times x, [x, T]: low bits and high bits apart, which are never put in a row."""
    scales = jnp.repeat(w.scales_DX.T, GROUP // 2, axis=1)
    low, high = (half.astype(jnp.float32) * scales for half in halves(w.pairs_XD))
    return lax.dot_general(low, x_TD[:, ::2], LAST) + lax.dot_general(high, x_TD[:, 1::2], LAST)


def _tile_of_numbers(w: PerColumn, x_TD: jax.Array) -> jax.Array:
    """Columns of 8-bit numbers times x, [x, T]; weights on the left are faster."""
    return lax.dot_general(w.numbers_XD.astype(jnp.float32), x_TD, LAST) * w.scales_X[:, None]


def _tile_of_bits(w: PerColumn, x_TD: jax.Array) -> jax.Array:
    """The same for the bits of float8_e4m3fn, which XLA widens three times as slowly as this."""
    bits = w.numbers_XD.astype(jnp.int32)
    size = bits & 127
    normal = lax.bitcast_convert_type((size << 20) + (120 << 23), jnp.float32)
    small = size.astype(jnp.float32) * 2.0**-9  # numbers below 2^-6 have no leading one
    number = jnp.where(size < 8, small, normal)
    return _tile_of_numbers(w._replace(numbers_XD=jnp.where(bits < 0, -number, number)), x_TD)


def _by_groups(x_TD: jax.Array, w: Grouped) -> jax.Array:
    """Products of 4-bit numbers where XLA cannot scale a group inside its product, in the cheaper of two ways."""
    (T, D), X = x_TD.shape, w.shape[1]
    if T > GROUPED_ROWS:
        w_XD = widened(w).astype(x_TD.dtype)
        return lax.dot_general(x_TD, w_XD, LAST, preferred_element_type=jnp.float32)
    pairs = w.pairs_XD.reshape(X, D // GROUP, GROUP // 2)
    x_by_pair = x_TD.reshape(T, D // GROUP, GROUP // 2, 2)
    over = (((2,), (2,)), ((1,), (1,)))  # a batch of groups
    y_DTX = sum(
        lax.dot_general(x_by_pair[..., i], half.astype(x_TD.dtype), over, preferred_element_type=jnp.float32)
        for i, half in enumerate(halves(pairs))
    )
    return jnp.sum(y_DTX * w.scales_DX[:, None], axis=0)
