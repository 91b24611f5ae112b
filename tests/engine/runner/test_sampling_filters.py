"""What min_p, top_k and top_p leave, on small cases by hand and on large vocabularies by definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engine.runner.filters import kept


def normal(seed: int, *shape: int, scale: float = 3.0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=shape) * scale).astype(np.float32)


def keep_of(logits: np.ndarray, **fields) -> np.ndarray:
    """bool [B, V] of what the filters leave, at temperature 1."""
    x = jnp.asarray(logits)
    rule = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, **fields}
    lines = jnp.ones(len(logits))
    args = (lines.astype(jnp.int32) * rule["top_k"], lines * rule["top_p"], lines * rule["min_p"])
    return np.asarray(jax.jit(kept)(x, x.max(1), lines, *args))


def test_ties_at_the_kth_value_stay():
    logits = np.asarray([[1.0, 3.0, 2.0, 2.0, 0.0, 2.0, -0.0]], np.float32)
    assert np.flatnonzero(keep_of(logits, top_k=2)).tolist() == [1, 2, 3, 5]
    assert np.flatnonzero(keep_of(logits, top_k=5)).tolist() == [0, 1, 2, 3, 5]
    assert np.flatnonzero(keep_of(logits, top_k=6)).tolist() == [0, 1, 2, 3, 4, 5, 6]  # -0.0 equals 0.0


@pytest.mark.parametrize("k", [1, 7, 100, 4999, 5000, 2**31 - 1])
def test_top_k_keeps_k_of_distinct_values(k):
    logits = normal(k % 97, 3, 5000)
    logits[1] *= 1e-20
    logits[2] += 1e4
    keep = keep_of(logits, top_k=k)
    for x, kept_V in zip(logits, keep, strict=True):
        threshold = np.sort(x)[::-1][min(k, 5000) - 1]
        assert (kept_V == (x >= threshold)).all()


def test_top_p_is_exact_on_flat_and_steep_vocabularies_of_fifty_thousand():
    num = 50_000
    scales = (1e-3, 0.3, 1.0, 4.0)
    logits = np.stack([normal(1, num, scale=scale) for scale in scales])
    for top_p in (1e-9, 0.05, 0.5, 0.9, 0.999):
        keep = keep_of(logits, top_p=top_p)
        for x, kept_V, scale in zip(logits, keep, scales, strict=True):
            order = np.argsort(-x)
            p = np.exp(x[order].astype(np.float64) - x.max())
            needed = 1 + np.searchsorted(np.cumsum(p / p.sum()), top_p)
            count = kept_V.sum()
            assert kept_V[order[:count]].all()
            # in a flat vocabulary some probabilities are equal in float32: those stand together
            assert needed - 1 <= count <= needed + (8 if scale < 0.1 else 1)


def test_equal_logits_stand_or_fall_together_under_top_p():
    assert keep_of(np.zeros((1, 50_000), np.float32), top_p=0.1).all()
    logits = np.log(np.asarray([[0.4, 0.2, 0.2, 0.1, 0.1]], np.float32))
    assert np.flatnonzero(keep_of(logits, top_p=0.5)).tolist() == [0, 1, 2]
    assert np.flatnonzero(keep_of(logits, top_p=0.3)).tolist() == [0]
    assert np.flatnonzero(keep_of(logits, top_p=0.85)).tolist() == [0, 1, 2, 3, 4]


def test_top_p_is_taken_of_what_top_k_and_min_p_left():
    logits = np.log(np.asarray([[0.4, 0.3, 0.2, 0.1]], np.float32))
    assert np.flatnonzero(keep_of(logits, top_p=0.65)).tolist() == [0, 1]
    assert np.flatnonzero(keep_of(logits, top_p=0.55, top_k=2)).tolist() == [0]  # 0.4 of 0.7
    assert np.flatnonzero(keep_of(logits, top_p=0.55, min_p=0.6)).tolist() == [0]


def test_min_p_is_measured_by_the_best():
    logits = np.log(np.asarray([[0.4, 0.3, 0.2, 0.1]], np.float32))
    assert np.flatnonzero(keep_of(logits, min_p=0.45)).tolist() == [0, 1, 2]
    assert np.flatnonzero(keep_of(logits, min_p=1.0)).tolist() == [0]
