"""Quantised weights are the nearest of their format, and are cut and placed with their scales."""

import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from pallas_kernels.matmul import matmul
from pallas_kernels.quantised import GROUP, Grouped, PerColumn, cut, dequantise, quantise, split
from tests.pallas_kernels.weights64 import drawn, stands_for

KINDS = ("int8", "fp8", "int4")


@pytest.mark.parametrize("kind", KINDS)
def test_the_numbers_are_the_nearest_and_the_largest_is_the_largest(kind):
    _, w_DX = drawn(1, 256, 24)
    w = quantise(jnp.asarray(w_DX), kind)
    stood_DX = stands_for(w)
    np.testing.assert_allclose(dequantise(w), stood_DX, rtol=1e-6)
    assert w.shape == w_DX.shape
    tops = np.abs(w_DX).reshape(-1, GROUP if kind == "int4" else 256, 24).max(axis=1)
    got_tops = np.abs(stood_DX).reshape(-1, GROUP if kind == "int4" else 256, 24).max(axis=1)
    np.testing.assert_allclose(got_tops, tops, rtol=1e-6)
    steps = {"int8": 1 / 127, "int4": 1 / 7, "fp8": 1 / 14}  # of fp8, between its two largest binades
    half_DX = np.repeat(tops, len(w_DX) // len(tops), axis=0) * steps[kind] / 2
    assert (np.abs(stood_DX - w_DX) <= half_DX * (1 + 1e-5)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_parts_of_quantised_weights_are_those_of_the_whole(kind):
    w_DX = drawn(1, 512, 24)[1]
    w = quantise(jnp.asarray(w_DX), kind)
    whole_DX = stands_for(w)
    np.testing.assert_allclose(stands_for(cut(w, "X", 8, 17)), whole_DX[:, 8:17])
    np.testing.assert_allclose(stands_for(cut(w, "D", 128, 384)), whole_DX[128:384])


def test_numbers_that_share_a_scale_are_not_parted():
    w = quantise(jnp.ones((256, 8)), "int4")
    with pytest.raises(ValueError, match="int4 weights cut at rows 64 and 256: expected multiples of 128"):
        cut(w, "D", 64, 256)
    with pytest.raises(ValueError, match="int4 weights of 200 rows: expected a multiple of 128"):
        quantise(jnp.ones((200, 8)), "int4")


def test_scales_split_with_their_columns_and_groups_with_their_rows():
    eight, four = (quantise(jnp.ones((256, 8)), kind) for kind in ("int8", "int4"))
    assert split(eight, "X", ("kv", "rep")) == PerColumn(P(("kv", "rep"), None), P(("kv", "rep")))
    assert split(eight, "D", "tp") == PerColumn(P(None, "tp"), P(None))
    assert split(four, "X", "tp") == Grouped(P("tp", None), P(None, "tp"))
    assert split(four, "D", "tp") == Grouped(P(None, "tp"), P("tp", None))


def test_arrays_that_make_no_product_are_refused_by_their_shapes():
    eight, four = (quantise(jnp.ones((256, 8)), kind) for kind in ("int8", "int4"))
    x_TD = jnp.ones((2, 256))
    with pytest.raises(ValueError, match=r"tokens \(2, 128\): expected \[T, 256\] for weights of 256 rows and 8"):
        matmul(x_TD[:, :128], eight)
    with pytest.raises(ValueError, match=r"with scales \(4,\): expected int8 or float8_e4m3fn and scales \(8,\)"):
        matmul(x_TD, eight._replace(scales_X=eight.scales_X[:4]))
    with pytest.raises(ValueError, match="weights of int32"):
        matmul(x_TD, eight._replace(numbers_XD=eight.numbers_XD.astype(jnp.int32)))
    with pytest.raises(ValueError, match=r"int8 pairs of a multiple of 128 rows and scales \(2, 8\)"):
        matmul(x_TD, four._replace(scales_DX=four.scales_DX[:1]))
