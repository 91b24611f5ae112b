"""RoPE against the formulas of its sources, written plainly in float64."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from engine.models.config import Rope
from engine.models.rope import angles, frequencies, turn

H = 16
LLAMA3 = Rope("llama3", 10000.0, factor=8.0, original_context=64, low=1.0, high=4.0)
YARN = Rope("yarn", 10000.0, factor=4.0, original_context=64, low=1.0, high=32.0, attention_factor=1.2)


def plain(theta=10000.0):
    return [theta ** (-2 * i / H) for i in range(H // 2)]


def llama3(rope):
    """Pair by pair, by wavelength."""
    for frequency in plain(rope.theta):
        wavelength = 2 * math.pi / frequency
        if wavelength < rope.original_context / rope.high:
            yield frequency
        elif wavelength > rope.original_context / rope.low:
            yield frequency / rope.factor
        else:
            share = (rope.original_context / wavelength - rope.low) / (rope.high - rope.low)
            yield (1 - share) * frequency / rope.factor + share * frequency


def yarn(rope):
    """Pair by pair, by the dimension at which `low` and `high` turns fit in the context of pretraining."""

    def dimension(turns):
        return H * math.log(rope.original_context / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    first, last = max(math.floor(dimension(rope.high)), 0), min(math.ceil(dimension(rope.low)), H - 1)
    for i, frequency in enumerate(plain(rope.theta)):
        slowed = min(max((i - first) / (last - first), 0), 1)
        yield slowed * frequency / rope.factor + (1 - slowed) * frequency


@pytest.mark.parametrize(
    ("rope", "want"),
    [
        (Rope("default", 500.0), plain(500.0)),
        (Rope("linear", 10000.0, factor=2.5), [frequency / 2.5 for frequency in plain()]),
        (LLAMA3, list(llama3(LLAMA3))),
        (YARN, list(yarn(YARN))),
    ],
    ids=lambda value: value.kind if isinstance(value, Rope) else "",
)
def test_frequencies_follow_the_formula(rope, want):
    np.testing.assert_allclose(frequencies(rope, H), want, rtol=1e-6)


def test_llama3_keeps_slows_and_blends():
    ratio = np.array(plain()) / frequencies(LLAMA3, H)
    assert ratio[0] == pytest.approx(1) and ratio[-1] == pytest.approx(8)
    assert ((ratio > 1.001) & (ratio < 7.999)).any()


def test_a_yarn_ramp_of_no_width_is_a_step():
    rope = Rope("yarn", 10000.0, factor=4.0, original_context=10, low=1.0, high=1.0, truncate=False)
    ratio = np.array(plain()) / frequencies(rope, H)
    assert ratio[0] == pytest.approx(1) and ratio[1:] == pytest.approx(np.full(H // 2 - 1, 4.0))


def test_heads_turn_as_pairs_of_halves():
    positions_T = np.array([0, 1, 77, 4000])
    x_TNH = np.random.default_rng(0).normal(size=(4, 3, H)).astype(np.float32)
    got = turn(jnp.asarray(x_TNH), *angles(YARN, H, jnp.asarray(positions_T)))
    pairs = x_TNH[..., : H // 2].astype(np.float64) + 1j * x_TNH[..., H // 2 :]
    turned = 1.2 * pairs * np.exp(1j * positions_T[:, None, None] * frequencies(YARN, H).astype(np.float64))
    want = np.concatenate([turned.real, turned.imag], axis=-1)
    np.testing.assert_allclose(got, want, atol=2e-3, rtol=0)  # float32 angles of thousands of radians
    np.testing.assert_allclose(got[:3], want[:3], atol=2e-5, rtol=0)


def test_turning_keeps_the_dtype_of_the_heads():
    x_TNH = jnp.ones((1, 1, H), jnp.bfloat16)
    assert turn(x_TNH, *angles(YARN, H, jnp.array([3]))).dtype == jnp.bfloat16
