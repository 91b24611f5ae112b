"""Quantised products equal float64 products of the weights they stand for, in every form."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.matmul import matmul
from pallas_kernels.mosaic import matmul as mosaic
from pallas_kernels.quantised import quantise
from pallas_kernels.target import CPU, H200, Target
from pallas_kernels.xla.matmul import DIGIT_ROWS, GROUPED_ROWS
from tests.pallas_kernels.weights64 import drawn, stands_for

KINDS = ("int8", "fp8", "int4")
GPU = Target("cuda", 80)  # an architecture without kernels: XLA's forms for GPUs run on CPUs too
TARGETS = pytest.mark.parametrize("target", [CPU, GPU], ids=lambda target: target.platform)
DYNAMIC = {"int8": 0.02, "fp8": 0.05, "int4": 0.02}  # e4m3 has three bits of mantissa: off by up to 1/16 a number
multiply = jax.jit(matmul, static_argnames=("dynamic", "target"))


def error(got_TX, want_TX):
    assert got_TX.shape == want_TX.shape and got_TX.dtype == jnp.float32
    return np.abs(np.asarray(got_TX, np.float64) - want_TX).max() / np.abs(want_TX).max()


@TARGETS
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("T", [1, 3, DIGIT_ROWS + 1, GROUPED_ROWS + 1])
def test_a_product_is_that_of_the_weights_it_stands_for(kind, target, T):
    x_TD, w_DX = drawn(T, 384, 50)
    w = quantise(jnp.asarray(w_DX), kind)
    want_TX = x_TD.astype(np.float64) @ stands_for(w)
    assert error(multiply(x_TD, w, target=target), want_TX) < 1e-6
    assert 1e-4 < error(multiply(x_TD, w, dynamic=True, target=target), want_TX) < DYNAMIC[kind]
    x16_TD = jnp.asarray(x_TD, jnp.bfloat16)
    want_TX = np.asarray(x16_TD, np.float64) @ stands_for(w)
    assert error(multiply(x16_TD, w, target=target), want_TX) < 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_wide_weights_are_done_in_tiles_that_may_overlap(kind, monkeypatch):
    monkeypatch.setattr("pallas_kernels.xla.matmul.TILE_BYTES", 4 * 128 * 20)  # tiles of 20 columns
    x_TD, w_DX = drawn(DIGIT_ROWS + 1, 128, 50)
    w = quantise(jnp.asarray(w_DX), kind)
    got_TX = jax.jit(lambda x_TD, w: matmul(x_TD, w))(x_TD, w)
    assert error(got_TX, x_TD.astype(np.float64) @ stands_for(w)) < 1e-6


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_weights_and_tokens_agree_with_float64(data):
    """Outliers, zeros and magnitudes of any kind, within 1e-5 of what the sum could be."""
    kind, target = data.draw(st.sampled_from(KINDS)), data.draw(st.sampled_from([CPU, GPU]))
    T = data.draw(st.sampled_from([1, 3, 9]))
    x_TD, w_DX = drawn(T, 128, 16, data.draw(st.integers(0, 2**32 - 1)))
    for array in (x_TD, w_DX):
        for _ in range(data.draw(st.integers(0, 4))):
            row, column = data.draw(st.integers(0, array.shape[0] - 1)), data.draw(st.integers(0, 15))
            array[row, column] *= 10.0 ** data.draw(st.integers(-20, 6))
        array[:, data.draw(st.integers(0, 15))] *= data.draw(st.sampled_from([0, 1e-12, 1, 1e4]))
    x_TD *= 10.0 ** data.draw(st.integers(-12, 6))
    w = quantise(jnp.asarray(w_DX), kind)
    stood_DX = stands_for(w)
    got_TX = np.asarray(multiply(x_TD, w, target=target), np.float64)
    bound_TX = np.abs(x_TD).max(axis=1, keepdims=True).astype(np.float64) * np.abs(stood_DX).sum(axis=0)
    assert (np.abs(got_TX - x_TD.astype(np.float64) @ stood_DX) <= 1e-5 * bound_TX + 1e-30).all()


@TARGETS
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_zero_columns_and_zero_tokens_give_zeros(kind, target, dynamic):
    x_TD, w_DX = drawn(3, 128, 16)
    x_TD[1] = 0
    w_DX[:, 5] = 0
    w_DX[:, 6] = 1e-38  # too small for a scale
    got_TX = np.asarray(multiply(x_TD, quantise(jnp.asarray(w_DX), kind), dynamic=dynamic, target=target))
    assert (got_TX[1] == 0).all() and (got_TX[:, 5:7] == 0).all()
    assert np.isfinite(got_TX).all() and (got_TX[[0, 2]][:, 7:] != 0).all()


@TARGETS
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_token_that_is_not_finite_says_so_and_spoils_no_other(kind, target, dynamic):
    x_TD, w_DX = drawn(4, 128, 16)
    w = quantise(jnp.asarray(w_DX), kind)
    want_TX = np.asarray(multiply(x_TD, w, dynamic=dynamic, target=target))
    x_TD[1, 3], x_TD[2, 4] = np.nan, np.inf
    got_TX = np.asarray(multiply(x_TD, w, dynamic=dynamic, target=target))
    assert not np.isfinite(got_TX[1:3]).any()
    np.testing.assert_allclose(got_TX[[0, 3]], want_TX[[0, 3]], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_an_outlier_in_one_token_leaves_the_others_as_they_were(kind, dynamic):
    x_TD, w_DX = drawn(4, 128, 16)
    w = quantise(jnp.asarray(w_DX), kind)
    want_TX = np.asarray(multiply(x_TD, w, dynamic=dynamic))
    x_TD[1, 3] = 3e4
    got_TX = np.asarray(multiply(x_TD, w, dynamic=dynamic))
    np.testing.assert_allclose(got_TX[[0, 2, 3]], want_TX[[0, 2, 3]], rtol=1e-6, atol=1e-6)
    assert np.abs(got_TX[1] - 3e4 * stands_for(w)[3]).max() < 0.01 * np.abs(got_TX[1]).max()


@pytest.mark.parametrize(
    ("rows", "columns", "tokens", "dtype", "target", "reason"),
    [
        (512, 192, 7, "bfloat16", H200, None),
        (512, 192, 256, "float16", H200, None),
        (512, 192, 7, "bfloat16", H200._replace(arch=100), "capability 9.0"),
        (512, 192, 7, "bfloat16", CPU, "capability 9.0"),
        (512, 192, 7, "float32", H200, "tokens of float32 would be rounded"),
        (384, 192, 7, "bfloat16", H200, "384 rows and 192 columns are no multiples of 256 and 64"),
        (512, 200, 7, "bfloat16", H200, "512 rows and 200 columns are no multiples"),
        (512, 192, 257, "bfloat16", H200, "257 tokens are more than 256"),
    ],
)
def test_the_kernel_serves_what_it_says_and_xla_the_rest(rows, columns, tokens, dtype, target, reason, monkeypatch):
    x_TD = jnp.ones((tokens, rows), dtype)
    w = quantise(jnp.ones((rows, columns)), "int4")
    said = mosaic.unserved(target, x_TD, w)
    assert said is None if reason is None else reason in said
    monkeypatch.setattr(mosaic, "matmul", lambda x_TD, w, target: jnp.full((1, 1), 7.0))
    got_TX = matmul(x_TD, w, target=target)
    assert (got_TX.shape == (1, 1)) is (reason is None)


def test_the_kernels_rule_fills_the_device_and_its_shared_memory():
    for tokens, rows, columns in itertools.product((1, 8, 24, 25, 64, 65, 256), (256, 4096), (64, 640, 6144)):
        config = mosaic.rule(H200, tokens, rows, columns)
        tiles, steps = columns // (64 * config.consumers), rows // 256
        assert tiles * 64 * config.consumers == columns and 2 <= config.stages <= 6
        assert config.programs == min(tiles * steps, H200.cores // -(-tokens // mosaic.tokens_of(tokens)))
