"""The same tokens on any mesh, batch, chunking, order of arrival and cache state, in `invariant` mode.

CI draws 40 cases; `SERAC_CASES=200 pytest tests/engine/runner/test_invariance.py` draws more.
"""

import os
from functools import cache

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

CASES = int(os.environ.get("SERAC_CASES", "40"))
LENGTHS = (1, 15, 16, 17, 40, 63, 64, 65, 100)
OPTIONS = (
    {"temperature": 0.0},
    {"temperature": 0.8},
    {"temperature": 1.0, "top_k": 20, "top_p": 0.9, "logprobs": 2},
    {"temperature": 1.2, "min_p": 0.02, "repetition_penalty": 1.1},
)


@cache
def prompt(number: int) -> tuple[int, ...]:
    rng = np.random.default_rng(number)
    shared = np.random.default_rng(99).integers(0, 211, 48)  # every second prompt begins alike
    tail = rng.integers(0, 211, LENGTHS[number % len(LENGTHS)])
    return tuple(map(int, [*shared, *tail] if number % 2 else tail))


def submit(lane, number: int) -> None:
    lane.submit(f"{number}", prompt(number), seed=number, max_tokens=6, **OPTIONS[number % len(OPTIONS)])


@pytest.fixture(scope="module")
def alone(make_runner, hand_lane):
    """Tokens and log-probabilities of each request alone on mesh 1, in chunks of 64; made when first asked for."""
    known = {}

    def ask(number: int):
        if number not in known:
            lane = hand_lane(make_runner(1), max_tokens=64)
            submit(lane, number)
            lane.run()
            known[number] = (lane.tokens[f"{number}", 0], lane.logprobs[f"{number}", 0])
        return known[number]

    return ask


@settings(max_examples=CASES, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    tp=st.sampled_from((1, 2, 4, 8)),
    chunk=st.sampled_from((8, 64, 256)),
    batch=st.sampled_from((1, 7, 32)),
    order=st.randoms(use_true_random=False),
    warm=st.booleans(),
)
def test_tokens_and_logprobs_are_bit_equal_whatever_surrounds_a_sequence(
    make_runner, hand_lane, alone, tp, chunk, batch, order, warm
):
    rows = min(batch, chunk)
    lane = hand_lane(make_runner(tp), max_tokens=chunk, max_rows=rows)
    numbers = order.sample(range(36), batch)
    if warm:
        for number in numbers[::2]:
            submit(lane, number)
        lane.run()
    for number in numbers:
        submit(lane, number)
        for _ in range(order.randrange(3)):
            lane.lane.turn()
    lane.run()
    for number in numbers:
        tokens, logprobs = alone(number)
        assert lane.tokens[f"{number}", 0] == tokens, f"tokens of {number}"
        got = lane.logprobs[f"{number}", 0]
        if "logprobs" in OPTIONS[number % len(OPTIONS)]:
            assert got == logprobs, f"log-probabilities of {number}"
