"""Plans and results at random, and the header of a lane that they fit."""

import sys
from types import ModuleType

import numpy as np
import pytest

from engine.core.plan import COUNT, DRAW, SCORE, TOP, Draw, Load, StepPlan, StepResult
from engine.observe.plan_log import Header

HEADER = Header(
    lane="0",
    model="embedded",
    revision="r1",
    dtype="float32",
    kv_dtype="auto",
    numerics="invariant",
    mesh="tp=1",
    device="cpu",
    num_blocks=40,
    block_size=4,
    max_rows=16,
    max_length=64,
    max_tokens=600,
    vocab=997,
    serac="0",
    jax="0",
    jaxlib="0",
)


def draw(rng: np.random.Generator) -> Draw:
    """Every field from all of its domain."""
    biases = tuple((int(t), float(v)) for t, v in zip(rng.integers(0, 997, 3), rng.normal(size=3), strict=True))
    return Draw(
        seed=int(rng.integers(0, 2**63 - 1)),
        choice=int(rng.integers(0, 99)),
        prompt_length=int(rng.integers(1, 64)),
        temperature=float(rng.random()),
        top_k=int(rng.integers(0, 2**31)),
        top_p=float(rng.random()),
        min_p=float(rng.random()),
        repetition_penalty=float(rng.random() + 0.1),
        frequency_penalty=float(rng.normal()),
        presence_penalty=float(rng.normal()),
        logit_bias=biases[: rng.integers(0, 4)],
        masked_until=int(rng.integers(0, 64)),
        stop_ids=tuple(rng.integers(0, 997, rng.integers(0, 5)).tolist()),
        logprobs=int(rng.integers(-1, 21)),
    )


def load(rng: np.random.Generator) -> Load:
    tokens = rng.integers(0, HEADER.vocab, rng.integers(1, 33)).astype(np.int32)
    blocks = rng.integers(1, HEADER.num_blocks, rng.integers(0, 9)).astype(np.int32)
    return Load(int(rng.integers(0, HEADER.max_rows)), tokens, blocks, draw(rng))


def plan(seed: int) -> StepPlan:
    """A plan that a lane of HEADER can run."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, 16, (rng.integers(0, 9), 6)).astype(np.int32)
    one_token = bool(rng.integers(0, 2))
    rows[:, COUNT] = 1 if one_token else rows[:, COUNT] + 1
    rows[:, DRAW] %= 2
    rows[:, SCORE] = 0 if one_token else np.minimum(rows[:, SCORE] % 2, rows[:, COUNT] - rows[:, DRAW])
    loads = tuple(load(rng) for _ in range(rng.integers(0, 4)))
    points = int(rows[:, SCORE].sum() + rows[:, DRAW].sum())
    step = int(rng.integers(0, 2**40))
    return StepPlan(step, rows, loads, int(rows[:, COUNT].sum()), points, one_token, bool(rng.integers(0, 2)))


def result(seed: int) -> StepResult:
    rng = np.random.default_rng(seed)
    points = int(rng.integers(0, 9))
    tokens, finite = rng.integers(0, 997, points).astype(np.int32), rng.random(points) < 0.9
    if seed % 2:
        return StepResult(3, tokens, finite)
    tops = rng.integers(0, 997, (points, TOP)).astype(np.int32), -rng.random((points, TOP)).astype(np.float32)
    return StepResult(3, tokens, finite, -rng.random(points).astype(np.float32), tokens + 1, *tops)


@pytest.fixture(scope="session")
def steps() -> ModuleType:
    """The functions above."""
    return sys.modules[__name__]
