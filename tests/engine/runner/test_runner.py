"""The runner with a tiny model: tokens, scores, failures and memory of real steps."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engine.errors import DeviceError, NumericError
from engine.runner.buckets import COARSE, FINE, Bucket, buckets, fitting, ladder
from engine.runner.runner import Runner
from engine.runner.state import load_lengths

FAST = {"numerics": "fast"}


def prompt(length, seed=0):
    return np.random.default_rng(seed).integers(0, 211, length)


def streams(lane):
    return {key: list(value) for key, value in lane.tokens.items()}


@pytest.fixture(scope="module")
def runner(make_runner):
    return make_runner(1, **FAST)


def test_a_lane_never_has_more_than_24_step_programs():
    for rows in (1, 2, 3, 8, 64, 100, 256, 1000, 4096):
        for tokens in (rows, 2 * rows, 8192):
            if tokens >= rows:
                assert len(buckets(rows, tokens)) <= 24 and len(buckets(rows, tokens, COARSE)) <= 10
                assert fitting(buckets(rows, tokens, FINE), tokens, rows, False, True).tokens == tokens


def test_a_ladder_ends_with_the_largest_and_starts_no_lower_than_the_smallest():
    assert ladder(1, 64, 7) == (1, 2, 4, 8, 16, 32, 64)
    assert ladder(1, 256, 7)[-1] == 256 and len(ladder(1, 256, 7)) <= 7
    assert (
        ladder(16, 16, 5) == (16,)
        and ladder(1, 64, 1) == (64,)
        and ladder(1, 64, 2) == (1, 64)
        and load_lengths(40) == (40,)
    )


def test_greedy_tokens_follow_from_the_whole_sequence_each_time(runner, hand_lane):
    """Incremental decoding with a paged cache equals a fresh prefill of everything before each token."""
    lane = hand_lane(runner)
    lane.submit("a", prompt(21), temperature=0.0, max_tokens=8)
    lane.run()
    got = lane.tokens["a", 0]
    assert len(set(got)) > 2, "the model must react, or this shows nothing"
    for k in range(8):
        again = hand_lane(runner)
        again.submit("b", [*prompt(21), *got[:k]], temperature=0.0, max_tokens=1)
        assert again.run().tokens["b", 0] == got[k : k + 1]


def test_a_changed_prompt_token_changes_the_output(runner, hand_lane):
    lane = hand_lane(runner)
    changed = prompt(33)
    changed[9] = (changed[9] + 1) % 211
    lane.submit("a", prompt(33), temperature=0.0, max_tokens=8)
    lane.submit("b", changed, temperature=0.0, max_tokens=8)
    lane.run()
    assert lane.tokens["a", 0] != lane.tokens["b", 0]


def test_no_token_of_the_padded_vocabulary_is_drawn_or_listed(runner, hand_lane):
    lane = hand_lane(runner)
    lane.submit("a", prompt(5), temperature=100.0, max_tokens=60, logprobs=20)
    lane.run()
    assert max(lane.tokens["a", 0]) < 211 and len(set(lane.tokens["a", 0])) > 20


def test_choices_of_a_request_differ_and_repeat_with_the_seed(runner, hand_lane):
    first, second = hand_lane(runner), None
    first.submit("a", prompt(40), seed=5, n=3, max_tokens=10)
    first.run()
    second = hand_lane(runner)
    second.submit("a", prompt(40), seed=5, n=3, max_tokens=10)
    second.run()
    assert streams(first) == streams(second)
    assert len({tuple(tokens) for tokens in first.tokens.values()}) == 3


def test_prompt_logprobs_equal_the_logprobs_of_drawing_the_same_tokens(runner, hand_lane):
    lane = hand_lane(runner)
    lane.submit("a", prompt(12), temperature=0.0, logprobs=3, max_tokens=10)
    lane.run()
    whole = hand_lane(runner, max_tokens=7, max_rows=4)
    whole.submit("b", [*prompt(12), *lane.tokens["a", 0]], prompt_logprobs=3, max_tokens=1)
    whole.run()
    scored = np.concatenate([event.logprob for event in whole.scored])
    assert len(scored) == 21
    np.testing.assert_allclose(scored[11:], lane.logprobs["a", 0], atol=2e-5)


def test_a_step_that_the_device_fails_is_recovered_token_for_token(runner, hand_lane):
    lane = hand_lane(runner)
    for k in range(3):
        lane.submit(f"{k}", prompt(20, k), seed=k, max_tokens=12)
    want = streams(lane.run())
    lane = hand_lane(runner)
    for k in range(3):
        lane.submit(f"{k}", prompt(20, k), seed=k, max_tokens=12)
    real, calls = runner.collect, []

    def collect():
        calls.append(1)
        result = real()
        if len(calls) == 6:
            raise DeviceError("injected")
        return result

    runner.collect = collect
    try:
        assert streams(lane.run()) == want and len(calls) > 6
    finally:
        del runner.collect


def test_a_launch_that_raises_once_is_made_again(runner, hand_lane):
    lane = hand_lane(runner)
    lane.submit("a", prompt(20), max_tokens=12)
    want = streams(lane.run())
    lane = hand_lane(runner)
    lane.submit("a", prompt(20), max_tokens=12)
    real, calls = runner.launch, []

    def launch(plan):
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("injected before dispatch")
        real(plan)

    runner.launch = launch
    try:
        assert streams(lane.run()) == want
    finally:
        del runner.launch


def test_non_finite_logits_end_that_sequence_only(make_runner, hand_lane):
    runner = make_runner(1, **FAST)
    lane = hand_lane(runner)
    lane.submit("good", prompt(20), seed=1, max_tokens=12)
    want = list(lane.run().tokens["good", 0])
    embed = runner.model.weights["embed_VD"]
    table = np.array(embed)
    table[7] = np.nan
    spoiled = dict(runner.model.weights) | {"embed_VD": jax.device_put(table, embed.sharding)}
    healthy, runner.model = (
        runner.model,
        type(runner.model)(
            runner.model.config, spoiled, runner.model.mesh, runner.model.dtype, runner.model.numerics
        ),
    )
    try:
        lane = hand_lane(runner)
        lane.submit("bad", [7, 7, 7], max_tokens=4)
        lane.run()
        assert isinstance(lane.ended["bad", 0].error, NumericError) and lane.tokens["bad", 0] == []
    finally:
        runner.model = healthy
    lane = hand_lane(runner)
    lane.submit("good", prompt(20), seed=1, max_tokens=12)
    assert lane.run().tokens["good", 0] == want


def test_a_thousand_mixed_requests_compile_nothing_after_ready(runner, hand_lane):
    lane, rng = hand_lane(runner), np.random.default_rng(0)
    runner.compiles.seal()
    options = (
        {"temperature": 0.0},
        {"temperature": 0.7},
        {"top_k": 5, "top_p": 0.9},
        {"logprobs": 2},
        {"repetition_penalty": 1.2},
        {"min_p": 0.1, "n": 2},
        {"prompt_logprobs": 1},
        {"logit_bias": ((3, 5.0),), "frequency_penalty": 0.5},
    )
    for k in range(1000):
        length = int(rng.integers(1, 90))
        lane.submit(
            f"{k}", prompt(length, k), seed=k, max_tokens=int(rng.integers(1, 6)), **options[k % len(options)]
        )
    lane.run()
    assert runner.compiles.late == 0 and len(lane.ended) == 1000 + 125
    assert lane.scheduler.pool.available == lane.scheduler.pool.usable


def test_a_thousand_cancels_at_random_moments_leave_the_pool_as_it_was(runner, hand_lane):
    lane, rng = hand_lane(runner), np.random.default_rng(1)
    live, cancelled, k = [], 0, 0
    while cancelled < 1000:
        if len(live) < 40:
            live += lane.submit(f"{k}", prompt(int(rng.integers(1, 120)), k), seed=k, max_tokens=30)
            k += 1
        if rng.random() < 0.5 and live:
            cancelled += lane.scheduler.cancel(live.pop(rng.integers(len(live))))
        else:
            lane.lane.turn()
    for sequence in live:
        lane.scheduler.cancel(sequence)
    lane.run()
    assert lane.scheduler.pool.available == lane.scheduler.pool.usable and lane.scheduler.idle


def test_the_cache_is_updated_in_place(runner):
    """Temporaries do not grow with the pool, which a copy of it would make them do."""
    choice = (Bucket(4, 4, True, False),)
    larger = Runner(runner.model, dataclasses.replace(runner.sizes, num_blocks=4 * runner.sizes.num_blocks), choice)
    larger.warm_up()
    assert larger.programs[choice[0]].temp_bytes == runner.programs[choice[0]].temp_bytes


def test_a_bfloat16_lane_draws_tokens_and_reads_its_cache_back(make_runner, hand_lane):
    runner = make_runner(2, "fast", jnp.bfloat16, CHOICES_SMALL)
    assert runner.state.k.dtype == np.uint16
    lane = hand_lane(runner, max_tokens=16, max_rows=4)
    lane.submit("a", prompt(30), temperature=0.0, max_tokens=6)
    got = list(lane.run().tokens["a", 0])
    again = hand_lane(runner, max_tokens=16, max_rows=4)
    again.submit("b", [*prompt(30), *got[:5]], temperature=0.0, max_tokens=1)
    assert again.run().tokens["b", 0] == got[5:] and jax.device_count() >= 2


CHOICES_SMALL = tuple(bucket for bucket in buckets(4, 16, (1, 1)) if not bucket.full)
