"""The Mosaic product with 4-bit weights, interpreted: equal to float64 products, no races, no place left behind."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.mosaic import matmul as mosaic
from pallas_kernels.quantised import quantise
from pallas_kernels.target import H200
from tests.pallas_kernels.mosaic.interpreting import interpreted
from tests.pallas_kernels.weights64 import drawn, stands_for


def product(T, D, X, dtype=jnp.bfloat16, config=None, races=False):
    """The largest error of a product, of its largest number."""
    x_TD, w_DX = drawn(T, D, X, seed=T)
    x_TD, w = jnp.asarray(x_TD, dtype), quantise(jnp.asarray(w_DX), "int4")
    assert mosaic.unserved(H200, x_TD, w) is None
    with interpreted(races=races):
        got_TX = np.asarray(jax.jit(lambda x_TD, w: mosaic.matmul(x_TD, w, config=config))(x_TD, w))
    want_TX = np.asarray(x_TD, np.float64) @ stands_for(w)
    assert got_TX.shape == (T, X) and got_TX.dtype == np.float32
    return np.abs(got_TX - want_TX).max() / np.abs(want_TX).max()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_programs_share_tiles_of_columns_and_leave_no_step_out(dtype):
    """Six steps in three tiles for four programs: shares of one and two steps, one of them across two tiles."""
    config = mosaic.Config(consumers=1, stages=1, programs=4)
    assert product(3, 512, 192, dtype, config) < 1e-6


def test_several_consumers_and_tiles_of_tokens_each_do_their_own():
    config = mosaic.Config(consumers=2, stages=2, programs=1)
    assert product(72, 256, 128, config=config) < 1e-6


def test_places_are_not_filled_before_they_are_free():
    config = mosaic.Config(consumers=2, stages=2, programs=1)
    assert product(8, 1024, 128, config=config, races=True) < 1e-6
