"""Sums by halving: one order for one width."""

import jax
import numpy as np
import pytest

from pallas_kernels.numerics import tree_sum


def by_hand(x):
    """One row, in NumPy's float32: pad to a power of two, add the halves."""
    width = 1
    while width < len(x):
        width *= 2
    x = np.concatenate([x, np.zeros(width - len(x), np.float32)])
    while len(x) > 1:
        x = x[: len(x) // 2] + x[len(x) // 2 :]
    return x[0]


@pytest.mark.parametrize("width", [1, 2, 3, 64, 100, 1024])
@pytest.mark.parametrize("rows", [1, 7, 64])
def test_a_row_has_the_bits_of_the_halving_tree_in_any_batch(width, rows):
    x = np.random.default_rng(width).normal(size=(rows, width)).astype(np.float32)
    got = np.asarray(jax.jit(tree_sum)(x))
    np.testing.assert_array_equal(got, np.array([by_hand(row) for row in x]))


def test_any_axis_can_be_summed_and_kept():
    x = np.arange(30, dtype=np.float32).reshape(2, 5, 3)
    np.testing.assert_array_equal(tree_sum(x, axis=1), x.sum(1))
    np.testing.assert_array_equal(tree_sum(x, axis=-2, keepdims=True), x.sum(1, keepdims=True))
    assert tree_sum(np.zeros((3, 0), np.float32)).tolist() == [0, 0, 0]
