"""Draws against a NumPy reference, row by row, and the promise that a row's bits are its own."""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, PartitionSpec

from engine.core.plan import TOP, Draw
from engine.runner import draws as records
from engine.runner import sampling
from engine.runner.draws import BLANK

LENGTH = 48  # history positions of the small lanes here

# the size of the vocabulary is a traced number here, and shapes are few, so that few programs are compiled
full = jax.jit(sampling.draw_full)
plain = jax.jit(sampling.draw_plain)


def processed64(logits: np.ndarray, draw: Draw, history: list[int]) -> np.ndarray:
    """Logits after the min_tokens mask, bias and penalties; `history` is the sequence before the drawn token."""
    x = logits.astype(np.float64).copy()
    if len(history) < draw.masked_until:
        x[list(draw.stop_ids)] = -np.inf
    for token, value in draw.logit_bias:
        x[token] += value
    prompt, output = history[: draw.prompt_length], history[draw.prompt_length :]
    for token in set(prompt) | set(output):
        x[token] = x[token] / draw.repetition_penalty if x[token] > 0 else x[token] * draw.repetition_penalty
    for token in set(output):
        x[token] -= draw.frequency_penalty * output.count(token) + draw.presence_penalty
    return x


def distribution64(logits: np.ndarray, draw: Draw, history: list[int]) -> np.ndarray:
    """Probability of each token to be drawn."""
    x = processed64(logits, draw, history)
    if draw.temperature == 0:
        p = np.zeros_like(x)
        p[int(np.argmax(x))] = 1
        return p
    p = np.exp((x - x.max()) / draw.temperature)
    p[p < draw.min_p * p.max()] = 0
    if 0 < draw.top_k < len(p):
        p[x < np.sort(x)[::-1][draw.top_k - 1]] = 0
    p /= p.sum()
    if draw.top_p < 1:
        above = np.array([p[x > value].sum() for value in x]) if len(x) < 500 else _mass_above(x, p)
        p[(above >= draw.top_p) & (x < x.max())] = 0
    return p / p.sum()


def _mass_above(x: np.ndarray, p: np.ndarray) -> np.ndarray:
    values, inverse = np.unique(-x, return_inverse=True)
    mass = np.bincount(inverse, weights=p, minlength=len(values))
    return (np.cumsum(mass) - mass)[inverse]


def log_probability(logits: np.ndarray) -> np.ndarray:
    """Log-softmax of the raw logits."""
    x = logits.astype(np.float64)
    return x - x.max() - math.log(np.exp(x - x.max()).sum())


def ranking(logits: np.ndarray) -> np.ndarray:
    """Token ids, best first; lower id first among equals."""
    return np.argsort(-logits, kind="stable")


def record(**fields) -> Draw:
    return dataclasses.replace(BLANK, **{"temperature": 1.0, **fields})


def packed(draws: list[Draw]) -> records.Draws:
    return records.decode(jnp.asarray(np.stack([records.encode(draw) for draw in draws])))


def padded(logits: np.ndarray) -> jnp.ndarray:
    """Logits with the padding of the vocabulary, which holds what would win if it were looked at."""
    extra = -logits.shape[1] % (1024 if logits.shape[1] > 64 else 72)
    return jnp.asarray(np.pad(logits, ((0, 0), (0, extra)), constant_values=1e9))


def draw(logits, draws, histories=None, targets=None, vocab=None):
    """draw_full of one point a row, with histories as lists; rows are padded as a bucket pads them."""
    num = len(draws)
    bucket = next(size for size in (1, 8, 64) if size >= num)
    histories = histories or [[0] * d.prompt_length for d in draws]
    history = np.zeros((bucket, LENGTH), np.int32)  # what lies past the length must not count
    position, target = np.zeros(bucket, np.int32), np.full(bucket, -1, np.int32)
    for row, tokens in enumerate(histories):
        history[row, : len(tokens)], position[row] = tokens, len(tokens)
    target[:num] = target[:num] if targets is None else targets
    lines = padded(np.pad(logits, ((0, bucket - num), (0, 0))))
    rows = np.arange(bucket, dtype=np.int32)
    records_B = packed([*draws, *[BLANK] * (bucket - num)])
    drawn = full(lines, records_B, history, rows, position, target, vocab=vocab or logits.shape[1])
    assert np.asarray(drawn.finite_B)[num:].all()
    return sampling.Drawn(*[np.asarray(field)[:num] for field in drawn])


def same(left, right) -> None:
    for a, b in zip(left, right, strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def normal(seed: int, *shape: int, scale: float = 3.0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=shape) * scale).astype(np.float32)


def support(logits: np.ndarray, **fields) -> set[int]:
    """Every token drawn over many seeds."""
    count = 64
    draws = [record(seed=seed, **fields) for seed in range(count)]
    return set(draw(np.tile(logits, (count, 1)), draws).tokens_B.tolist())


def test_greedy_takes_the_best_and_the_lowest_id_of_equals():
    logits = normal(0, 3, 50)
    logits[0, [9, 21, 40]] = 30.0
    logits[1] = 1.0
    expected = [9, 0, int(np.argmax(logits[2]))]
    draws = [record(temperature=0.0)] * 3
    assert draw(logits, draws).tokens_B.tolist() == expected
    tokens, finite = plain(padded(logits), packed(draws), jnp.zeros(3, jnp.int32), vocab=50)
    assert np.asarray(tokens).tolist() == expected and np.asarray(finite).all()


def test_a_tiny_temperature_draws_among_the_best_alone():
    logits = normal(1, 1, 60)
    logits[0, [4, 50]] = logits.max() + 1
    for temperature in (1e-3, 1e-30, 1e-300):
        assert support(logits[0], temperature=temperature) == {4, 50}


def test_temperature_flattens():
    logits = np.asarray([0.0, 4.0], np.float32)
    share = [np.mean(_many(logits, temperature=t) == 0) for t in (0.5, 1.0, 4.0)]
    assert share[0] < share[1] < share[2] < 0.5


def _many(logits: np.ndarray, count: int = 4096, **fields) -> np.ndarray:
    """Draws of one seed at `count` positions, by draw_plain."""
    lines = jnp.tile(padded(logits[None]), (count, 1))
    draws = records.at_points(packed([record(**fields)]), jnp.zeros(count, jnp.int32))
    return np.asarray(plain(lines, draws, jnp.arange(count, dtype=jnp.int32), vocab=len(logits))[0])


def test_draws_follow_the_distribution():
    logits = normal(3, 24, scale=1.5)
    expected = distribution64(logits, record(temperature=0.8), []) * 4096
    found = np.bincount(_many(logits, seed=12, temperature=0.8), minlength=24)
    # 23 degrees of freedom: the statistic passes 49.7 once in a thousand seeds
    assert ((found - expected) ** 2 / expected).sum() < 49.7


def test_a_flat_large_vocabulary_has_no_favourites():
    tokens = _many(np.zeros(4096, np.float32), seed=5, temperature=1.0)
    counts = np.bincount(tokens // 256, minlength=16)
    # 15 degrees of freedom, once in a thousand
    assert ((counts - 256) ** 2 / 256).sum() < 37.7
    assert len(set(tokens.tolist())) > 2400  # 4096 (1 - 1/e) = 2589 are expected


def test_repetition_reaches_prompt_and_output_and_the_others_output_alone():
    logits = np.asarray([[5.0, 4.0, 3.0, -1.0, -2.5]], np.float32)
    greedy = {"temperature": 0.0, "prompt_length": 2}
    history = [[0, 3, 1, 1]]  # prompt 0 3, output 1 1
    for fields, expected in [
        ({}, 0),
        ({"repetition_penalty": 2.0}, 2),
        ({"frequency_penalty": 2.0}, 0),
        ({"frequency_penalty": -1.0}, 1),
        ({"presence_penalty": -1.5}, 1),
        ({"presence_penalty": -0.5}, 0),
        ({"frequency_penalty": -0.6}, 1),  # counted twice: 5.2
    ]:
        assert draw(logits, [record(**greedy, **fields)], history).tokens_B.tolist() == [expected], fields
    negative = np.asarray([[-1.0, -1.5]], np.float32)
    assert draw(negative, [record(**greedy, repetition_penalty=2.0)], [[0, 0]]).tokens_B.tolist() == [1]


def test_counts_reach_over_many_tiles_of_history():
    length = 2 * sampling.HISTORY_TILE + 300
    rng = np.random.default_rng(4)
    history = rng.integers(0, 40, (2, length)).astype(np.int32)
    position, prompt = np.asarray([length, 1500]), [1100, 10]
    draws = packed([record(prompt_length=n) for n in prompt])
    counts = jax.jit(sampling._counts, static_argnums=4)(
        draws, history, jnp.asarray([1, 0]), jnp.asarray(position), 48
    )
    for point, row in enumerate([1, 0]):
        cut, end = prompt[point], position[point]
        assert np.asarray(counts)[0, point].tolist() == np.bincount(history[row, :cut], minlength=48).tolist()
        assert np.asarray(counts)[1, point].tolist() == np.bincount(history[row, cut:end], minlength=48).tolist()


def test_filters_bar_what_they_cut():
    logits = np.log(np.asarray([0.4, 0.3, 0.2, 0.1], np.float32))
    assert support(logits, top_k=2) == {0, 1}
    assert support(logits, top_p=0.65) == {0, 1}
    assert support(logits, min_p=0.45) == {0, 1, 2}
    assert support(logits) == {0, 1, 2, 3}


def test_bias_and_min_tokens_move_and_bar_tokens():
    logits = np.asarray([[5.0, 4.0, 3.0, 0.0]], np.float32)
    greedy = {"temperature": 0.0, "prompt_length": 2}
    barred = {"stop_ids": (0, 1), "masked_until": 4}
    assert draw(logits, [record(**greedy, logit_bias=((3, 6.0), (0, -3.0)))]).tokens_B.tolist() == [3]
    lengths = [[2, 2, 2], [2, 2, 2, 2], [2] * 5]  # barred below four
    drawn = draw(np.tile(logits, (3, 1)), [record(**greedy, **barred)] * 3, lengths)
    assert drawn.tokens_B.tolist() == [2, 0, 0]
    both = record(**greedy, **barred, logit_bias=((0, 100.0),))
    assert draw(logits, [both], [[2, 2]]).tokens_B.tolist() == [2]


def test_a_seed_choice_and_position_name_a_draw_and_high_bits_matter():
    logits = np.zeros((1, 4096), np.float32)

    def token(position=3, **fields):
        return int(plain(padded(logits), packed([record(**fields)]), jnp.asarray([position]), vocab=4096)[0][0])

    first = token(seed=1)
    assert token(seed=1) == first
    others = [token(seed=2), token(seed=1 + 2**32), token(seed=1 + 2**62), token(seed=1, choice=1)]
    assert len({first, *others, token(seed=1, position=4)}) == 6


def test_a_bad_row_gives_token_zero_and_leaves_its_neighbours_alone():
    logits = normal(7, 5, 64)
    draws = [record(seed=i, logprobs=2) for i in range(5)]
    clean = draw(logits, draws)
    for bad, line in ((np.nan, 1), (np.inf, 2), (-np.inf, 3)):
        logits[line, 13] = bad
    drawn = draw(logits, draws)
    tokens, finite = plain(padded(logits), packed(draws), jnp.zeros(5, jnp.int32), vocab=64)
    assert drawn.finite_B.tolist() == np.asarray(finite).tolist() == [True, False, False, False, True]
    assert drawn.tokens_B[1:4].tolist() == np.asarray(tokens)[1:4].tolist() == [0, 0, 0]
    assert np.isfinite(drawn.top_logprobs).all()
    same([field[[0, 4]] for field in clean], [field[[0, 4]] for field in drawn])


def test_logprobs_ranks_and_the_best_are_of_the_raw_logits():
    logits = normal(8, 3, 1000)
    logits[1, 100:200] = logits[1].max() + 1  # equals, more than are listed
    draws = [record(seed=i, logprobs=5, temperature=3.0, logit_bias=((5, 9.0),)) for i in range(3)]
    drawn = draw(logits, draws)
    for b, x in enumerate(logits):
        expected, order = log_probability(x), ranking(x)
        token = drawn.tokens_B[b]
        assert order[drawn.rank_B[b] - 1] == token
        np.testing.assert_allclose(drawn.logprob_B[b], expected[token], rtol=1e-5, atol=1e-5)
        assert drawn.top_ids[b].tolist() == order[:TOP].tolist()
        np.testing.assert_allclose(drawn.top_logprobs[b], expected[order[:TOP]], rtol=1e-5, atol=1e-5)


def test_a_vocabulary_smaller_than_the_list_lists_no_padding():
    drawn = draw(normal(2, 1, 11), [record(logprobs=20)])
    assert sorted(drawn.top_ids[0, :11].tolist()) == list(range(11))
    assert (drawn.top_ids[0, 11:] == -1).all() and (drawn.top_logprobs[0, 11:] == -np.inf).all()


def test_a_scored_token_is_judged_and_not_drawn():
    logits = normal(9, 2, 300)
    drawn = draw(logits, [record(top_k=1, logit_bias=((1, 100.0),))] * 2, targets=[250, -1])
    assert drawn.tokens_B.tolist() == [250, 1]
    assert ranking(logits[0])[drawn.rank_B[0] - 1] == 250
    np.testing.assert_allclose(drawn.logprob_B[0], log_probability(logits[0])[250], rtol=1e-5)
    assert drawn.logprob_B[1] == 0 and drawn.rank_B[1] == 0


MIX = [
    record(temperature=0.0),
    record(seed=2, logprobs=0),
    record(seed=3, top_k=20, temperature=0.7),
    record(seed=4, top_p=0.9, prompt_length=2, repetition_penalty=1.3),
    record(seed=5, min_p=0.05, prompt_length=5, frequency_penalty=0.7, presence_penalty=0.3),
    record(seed=6, top_k=50, top_p=0.8, min_p=0.01, logprobs=20),
    record(seed=7, logit_bias=((3, 5.0), (8, -100.0)), stop_ids=(1, 2), masked_until=9),
    record(seed=2**60 + 8, temperature=1.7),
]
MIX_HISTORIES = [[(i * j) % 11 for j in range(3 + i)] for i in range(len(MIX))]


def test_a_row_draws_the_same_bits_whoever_stands_beside_it():
    logits = normal(10, len(MIX), 1001)
    together = draw(logits, MIX, MIX_HISTORIES)
    rng = np.random.default_rng(0)
    for size in (1, 1, 1, 3, 5, 8, 20, 64):
        pick = rng.integers(0, len(MIX), size)
        drawn = draw(logits[pick], [MIX[i] for i in pick], [MIX_HISTORIES[i] for i in pick])
        same(drawn, [field[pick] for field in together])


def test_plain_and_full_draw_the_same_bits():
    logits = normal(11, 64, 1003)
    draws = [record(seed=i, temperature=(i % 4) / 2) for i in range(64)]
    assert all(d.plain for d in draws)
    mixed = [*draws[:-1], record(seed=1, top_p=0.5, logprobs=3, logit_bias=((1, 1.0),), presence_penalty=1.0)]
    tokens = plain(padded(logits), packed(draws), jnp.zeros(64, jnp.int32), vocab=1003)[0]
    assert np.asarray(tokens)[:-1].tolist() == draw(logits, mixed).tokens_B[:-1].tolist()


def test_padding_of_the_vocabulary_changes_nothing():
    logits = normal(12, len(MIX), 1003)
    wide = np.pad(logits, ((0, 0), (0, 13)), constant_values=np.nan)
    same(draw(logits, MIX, MIX_HISTORIES), draw(wide, MIX, MIX_HISTORIES, vocab=1003))


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (2, 2), (4, 2), (1, 8)])
def test_any_mesh_draws_the_same_bits(shape):
    logits = normal(13, 32, 4997)
    logits[3, 4100] = np.nan
    logits[4, [700, 4000]] = 50.0
    draws = packed([record(seed=i, temperature=0.0 if i < 8 else i / 16) for i in range(32)])
    position = jnp.arange(32, dtype=jnp.int32)
    whole = jnp.asarray(np.pad(logits, ((0, 0), (0, 3)), constant_values=1e9))
    one = plain(whole, draws, position, vocab=4997)
    count = shape[0] * shape[1]
    mesh = Mesh(np.asarray(jax.devices()[:count]).reshape(shape), ("kv", "rep"))
    local = partial(sampling.draw_plain, vocab=4997, axes=("kv", "rep"))
    split, same_everywhere = PartitionSpec(None, ("kv", "rep")), PartitionSpec()
    sharded = jax.jit(
        jax.shard_map(
            local, mesh=mesh, in_specs=(split, same_everywhere, same_everywhere), out_specs=same_everywhere
        )
    )
    same(one, sharded(whole, draws, position))
    assert int(one[0][4]) == 700 and not bool(one[1][3])


PARAMETERS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.3, 1.0, 2.5]),
        "top_k": st.integers(0, 40),
        "top_p": st.sampled_from([1.0, 0.97, 0.61, 0.2]),
        "min_p": st.sampled_from([0.0, 0.013, 0.3]),
        "repetition_penalty": st.sampled_from([1.0, 1.7, 0.6]),
        "frequency_penalty": st.sampled_from([0.0, 1.1, -0.7]),
        "presence_penalty": st.sampled_from([0.0, 0.9, -1.3]),
        "logit_bias": st.dictionaries(st.integers(0, 29), st.floats(-9, 9, width=16), max_size=4).map(
            lambda bias: tuple(bias.items())
        ),
        "stop_ids": st.sets(st.integers(0, 29), max_size=3).map(tuple),
        "masked_until": st.integers(0, 20),
        "prompt_length": st.integers(1, 6),
    }
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(PARAMETERS, st.integers(0, 1000), st.integers(0, 12))
def test_any_mix_of_parameters_draws_within_the_reference(fields, seed, length):
    """The tokens drawn over 64 seeds lie in the reference's support, and its likely ones are among them."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=30).astype(np.float32) * 2
    draws = [record(seed=s, **fields) for s in range(64)]
    history = rng.integers(0, 30, fields["prompt_length"] + length).tolist()
    drawn = draw(np.tile(logits, (64, 1)), draws, [history] * 64)
    p = distribution64(logits, draws[0], history)
    found = set(drawn.tokens_B.tolist())
    assert found <= set(np.flatnonzero(p).tolist())
    assert set(np.flatnonzero(p > 0.25).tolist()) <= found  # missed once in 1e8
