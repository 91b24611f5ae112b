"""Random weights depend on the seed and the name of a tensor, and on nothing else."""

import jax.numpy as jnp
import numpy as np
import pytest

from engine.models.config import from_hf
from engine.weights.drawn import PERIOD, draw, random_weights
from sharding.mesh import MeshSpec, lane_meshes

CONFIG = from_hf(
    {
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_size": 32,
        "intermediate_size": 44,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "vocab_size": 75,
    }
)


def weights_on(tp, seed=0, dtype=np.float32):
    (mesh,) = lane_meshes(MeshSpec(1, tp), CONFIG.heads, CONFIG.kv_heads)
    return random_weights(CONFIG, mesh, dtype, seed)


def test_a_tensor_is_drawn_from_its_seed_and_name():
    first = draw(1, "a.weight", (64, 100), np.float32)
    assert (first == draw(1, "a.weight", (64, 100), np.float32)).all()
    assert (first != draw(2, "a.weight", (64, 100), np.float32)).any()
    assert (first != draw(1, "b.weight", (64, 100), np.float32)).any()
    assert first.std() == pytest.approx(0.09, rel=0.05)
    assert draw(1, "norm.weight", (5000,), np.float32).mean() == pytest.approx(1, abs=0.01)


def test_a_period_repeats_values_and_changes_no_first_one():
    whole, repeated = (draw(1, "a.weight", (10, 10), np.float32, period) for period in (None, 7))
    assert (repeated.ravel()[:7] == whole.ravel()[:7]).all()
    assert (repeated.ravel()[7:14] == whole.ravel()[:7]).all()
    assert PERIOD % 2 and all(PERIOD % divisor for divisor in range(3, 2048, 2))


@pytest.mark.parametrize("tp", [2, 8])
def test_meshes_hold_the_same_logical_weights(tp):
    one, many = weights_on(1), weights_on(tp)
    assert (np.asarray(many["head_DV"])[:, :75] == np.asarray(one["head_DV"])[:, :75]).all()
    for layer in range(2):
        for name in ("wo_XD", "norms_2D"):
            assert (np.asarray(many["layers"][layer][name]) == np.asarray(one["layers"][layer][name])).all()
        columns_DX = np.asarray(many["layers"][layer]["wqkv_DX"]).reshape(32, tp, -1)
        queries = columns_DX[:, :, : 32 // tp].reshape(32, 32)
        assert (queries == np.asarray(one["layers"][layer]["wqkv_DX"])[:, :32]).all()


def test_weights_have_the_dtype_that_was_asked_for():
    assert weights_on(1, dtype=jnp.bfloat16)["layers"][0]["wd_FD"].dtype == jnp.bfloat16
    assert (np.asarray(weights_on(1)["head_DV"]) != np.asarray(weights_on(1, seed=1)["head_DV"])).any()
