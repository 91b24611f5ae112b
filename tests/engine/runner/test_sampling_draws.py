"""Records survive the way to the device bit for bit."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engine.core import request
from engine.runner import draws
from engine.runner.draws import BLANK


def test_a_record_survives_packing():
    draw = dataclasses.replace(
        BLANK,
        seed=2**63 - 2,
        choice=3,
        temperature=0.7,
        top_k=2**31 - 1,
        top_p=0.95,
        repetition_penalty=1.1,
        logit_bias=((5, -100.0), (9, 2.5)),
        stop_ids=(1, 2, 3),
        masked_until=17,
        logprobs=20,
    )
    packed = draws.encode(draw)
    assert packed.dtype == np.int32 and packed.shape == (draws.WIDTH,)
    found = jax.jit(draws.decode)(packed[None])
    assert int(found.seed_high_R[0]) == 2**31 - 1 and int(found.seed_low_R[0]) == 2**32 - 2
    assert found.temperature_R[0] == np.float32(0.7) and found.top_p_R[0] == np.float32(0.95)
    assert found.repetition_R[0] == np.float32(1.1) and int(found.top_k_R[0]) == 2**31 - 1
    assert found.stop_ids[0, :4].tolist() == [1, 2, 3, draws.NO_TOKEN]
    assert found.bias_ids[0, :3].tolist() == [5, 9, draws.NO_TOKEN]
    assert found.bias_values[0, :3].tolist() == [-100.0, 2.5, 0.0]
    assert [int(found.choice_R[0]), int(found.masked_until_R[0]), int(found.logprobs_R[0])] == [3, 17, 20]


def test_a_temperature_below_float32_stays_above_greedy():
    found = draws.decode(jnp.asarray(draws.encode(dataclasses.replace(BLANK, temperature=1e-300))[None]))
    assert found.temperature_R[0] > 0


def test_storing_fills_its_rows_and_drops_padding():
    packed = np.stack([draws.encode(dataclasses.replace(BLANK, seed=seed)) for seed in (7, 8, 9)])
    held = jax.jit(draws.store)(draws.empty(4), jnp.asarray([2, 0, 4]), jnp.asarray(packed))
    assert held.seed_low_R.tolist() == [8, 0, 7, 0]
    assert draws.at_points(held, jnp.asarray([2, 2, 1])).seed_low_R.tolist() == [7, 7, 0]


def test_room_in_the_record_is_what_a_request_may_ask():
    assert (draws.MAX_STOP_IDS, draws.MAX_BIAS) == (request.MAX_STOP_IDS, request.MAX_BIAS)
    with pytest.raises(ValueError, match="65 stop ids and 0 biases"):
        draws.encode(dataclasses.replace(BLANK, stop_ids=tuple(range(65))))
