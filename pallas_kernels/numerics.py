"""Numbers that every softmax here shares, and sums whose order depends on nothing but the length of the axis.

XLA's own reduce changes the order of its additions with the shape around the axis (once rows x width
passes about 4,096 elements), so the same row may get other bits in another batch. A halving tree of
elementwise additions has one order for one width, whatever else is in the array:

    a b c d e 0 0 0  ->  a+e b+0 c+0 d+0  ->  (a+e)+(c+0) (b+0)+(d+0)  ->  one value

Cost: log2(width) elementwise additions over ever smaller arrays; 2 times the reads of a plain reduce.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

NOTHING = -1e30  # the score of an unseen position: finite, so that a row that saw nothing yet gives no NaN
LOG2_E = math.log2(math.e)  # exponentials are powers of two on a GPU
LN_2 = math.log(2)


def tree_sum(x: jax.Array, axis: int = -1, keepdims: bool = False) -> jax.Array:
    """Sum of x over `axis`, in x's dtype, by a halving tree of elementwise additions."""
    axis = axis % x.ndim
    size = x.shape[axis]
    width = 1 << max(size - 1, 0).bit_length()
    if width != size:
        x = jnp.pad(x, [(0, width - size if i == axis else 0) for i in range(x.ndim)])
    while width > 1:
        width //= 2
        x = lax.slice_in_dim(x, 0, width, axis=axis) + lax.slice_in_dim(x, width, 2 * width, axis=axis)
    return x if keepdims else lax.squeeze(x, (axis,))
