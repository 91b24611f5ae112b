"""RMSNorm against its formula, rounded where the oracle rounds, and the same bits in any batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engine.models.norm import rms_norm

WIDTH, EPS = 521, 1e-5
X_TD = np.random.default_rng(0).normal(size=(67, WIDTH)).astype(np.float32)
WEIGHT_D = (1 + 0.1 * np.random.default_rng(1).normal(size=WIDTH)).astype(np.float32)


def norm(x, weight=WEIGHT_D, numerics="fast"):
    return jax.jit(rms_norm, static_argnums=(2, 3))(jnp.asarray(x), jnp.asarray(weight), EPS, numerics)


@pytest.mark.parametrize("numerics", ["fast", "invariant"])
def test_a_norm_follows_its_formula(numerics):
    x = X_TD.astype(np.float64)
    want = x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + EPS) * WEIGHT_D
    np.testing.assert_allclose(norm(X_TD, numerics=numerics), want, rtol=2e-6)
    heads = norm(X_TD[:, :512].reshape(67, 4, 128), WEIGHT_D[:128], numerics)
    assert heads.shape == (67, 4, 128) and float(jnp.abs(heads).mean()) == pytest.approx(0.8, abs=0.05)


def test_a_row_is_rounded_before_its_weight_is_applied():
    x, weight = jnp.asarray(X_TD, jnp.bfloat16), jnp.asarray(WEIGHT_D, jnp.bfloat16)
    unweighted = norm(x, jnp.ones(WIDTH, jnp.bfloat16))
    assert (norm(x, weight) == unweighted * weight).all() and unweighted.dtype == jnp.bfloat16


def test_an_invariant_norm_has_the_same_bits_in_any_batch():
    whole = norm(X_TD, numerics="invariant")
    for rows in (1, 3, 8, 33):
        assert (norm(X_TD[:rows], numerics="invariant") == whole[:rows]).all()
