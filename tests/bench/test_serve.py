"""The bench of the whole engine: what it says of tokens and times, without an engine, and one real run."""

import jax
import numpy as np
import pytest

from bench.serve import ANSWER, ask, beside, drawn, floor_s, model
from engine.llm import LLM


def told(together, alone=None):
    return {"together": together, "alone": alone or together, "programs": 4, "compile s": 1.0}


def answer(ids, logprob=-1.0):
    return [(each, logprob) for each in ids]


def test_answers_are_compared_up_to_the_first_other_token():
    same, other = list(range(ANSWER)), [0, 1, *range(100, 100 + ANSWER - 2)]
    found = beside(told([answer(same), answer(other, -1.5)]), told([answer(same), answer(same)]))
    assert (found["answers"], found["equal"], found["logprob gap"]) == (2, 1, 0.5)
    assert found["same tokens"] == (ANSWER + 2) / (2 * ANSWER)


def test_bits_alone_count_log_probabilities():
    same = answer(range(ANSWER))
    alone = [same[:-1] + [(same[-1][0], -1.0000001)], same]
    assert beside(told([same, same], alone), told([same, same]))["same alone"] == 1


@pytest.mark.slow
def test_a_shape_with_random_weights_answers_through_the_whole_engine():
    """Costs some seconds of compiling."""
    config = model("embedded")
    with drawn(config), jax.default_device(jax.devices()[0]):
        llm = LLM("embedded", mesh="tp=1", max_num_seqs=2, max_model_len=64, prefix_cache=False)
    took, waited = ask(llm, np.random.default_rng(0), config, 2, 5, 3)
    llm.replica.stop()
    assert 0 < waited < took and llm.replica.describe["programs"] == 3


@pytest.mark.parametrize("name, layers", [("llama-8b", 32), ("qwen3-0.6b", 28)])
def test_shapes_are_whole(name, layers):
    assert model(name).num_layers == len(model(name).windows) == layers


def test_the_floor_is_weights_and_keys_over_the_bandwidth_of_the_device():
    config = model("llama-8b")
    facts = {
        "device": "NVIDIA H200",
        "dtype": "bfloat16",
        "kv_bytes": 64 * 131072,
        "num_blocks": 1,
        "block_size": 64,
    }
    assert floor_s(config, facts, 0) * 4.8e12 == pytest.approx(15.0e9, rel=0.01)
    assert floor_s(config, facts, 1000) - floor_s(config, facts, 0) == pytest.approx(1000 * 131072 / 4.8e12)
    assert floor_s(config, facts | {"device": "another"}, 0) is None
