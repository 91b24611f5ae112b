"""The bytes of plans and results: they come back whole, and bytes that are anything else are refused, all alike."""

import dataclasses

import msgpack
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.core.plan import BLOCK, COUNT, DRAW, SCORE, START, Draw, Load, StepPlan, StepResult
from engine.core.plan import ROW as ROW_OF
from engine.errors import Malformed
from engine.observe.plan_bytes import (
    LOAD,
    MAX_BYTES,
    PLAN,
    RESULT,
    check_plan,
    decode_plan,
    decode_result,
    encode_plan,
    encode_result,
)

SEEDS = st.integers(0, 2**32)
quick = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)


def same(left: object, right: object) -> bool:
    """Equal in every field, arrays in dtype and shape too."""
    if isinstance(left, np.ndarray):
        return left.dtype == right.dtype and left.shape == right.shape and bool((left == right).all())
    if isinstance(left, tuple):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, (StepPlan, StepResult, Load)):
        return all(same(getattr(left, f.name), getattr(right, f.name)) for f in dataclasses.fields(left))
    return left == right and type(left) is type(right)


@quick
@given(SEEDS)
def test_a_plan_comes_back_as_it_was(steps, seed):
    plan = steps.plan(seed)
    assert same(decode_plan(encode_plan(plan)), plan)
    check_plan(plan, steps.HEADER.bounds)


@quick
@given(SEEDS)
def test_a_result_comes_back_as_it_was(steps, seed):
    result = steps.result(seed)
    assert same(decode_result(encode_result(result)), result)


def test_results_hold_what_the_device_gave_them_whatever_its_dtype_and_order():
    tokens, tops = np.array([3, 4], np.int64), np.arange(40, dtype=np.float64).reshape(20, 2).T
    ranks = np.ones(2, np.int32)
    result = StepResult(1, tokens, np.ones(2, bool), tokens / 2, ranks, tops.astype(np.int64), tops)
    back = decode_result(encode_result(result))
    assert back.tokens.dtype == np.int32 and back.top_logprobs.dtype == np.float32
    assert (back.top_ids == tops).all() and (back.logprob == [1.5, 2.0]).all()


@settings(quick, max_examples=600)
@given(SEEDS, st.data())
def test_mutated_bytes_are_a_message_of_the_schema_or_malformed(steps, seed, data):
    """Nothing else is raised, whatever is changed, cut, put in or said twice."""
    plan = bool(seed % 3)
    good = bytearray(encode_plan(steps.plan(seed)) if plan else encode_result(steps.result(seed)))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(good)))
        change = data.draw(st.sampled_from(("flip", "cut", "put", "repeat")))
        if change == "flip" and place < len(good):
            good[place] = data.draw(st.integers(0, 255))
        elif change == "cut":
            del good[place : place + data.draw(st.integers(1, 40))]
        elif change == "put":
            good[place:place] = data.draw(st.binary(max_size=12))
        else:
            good[place:place] = good[: data.draw(st.integers(0, 40))]
    try:
        message = decode_plan(bytes(good)) if plan else decode_result(bytes(good))
    except Malformed as error:
        assert len(str(error)) > 10 and error.exit_code == 2
    else:
        again = decode_plan(encode_plan(message)) if plan else decode_result(encode_result(message))
        assert same(again.tokens, message.tokens) if not plan else same(again.rows, message.rows)


@settings(quick, max_examples=300)
@given(st.binary(max_size=200))
def test_random_bytes_are_malformed(data):
    for decode in (decode_plan, decode_result):
        with pytest.raises(Malformed):
            decode(data)


def test_every_cut_of_a_plan_is_malformed(steps):
    data = encode_plan(steps.plan(5))
    for end in range(len(data)):
        with pytest.raises(Malformed):
            decode_plan(data[:end])


@pytest.mark.parametrize(
    "bomb",
    [
        b"\x91" * 100_000,
        b"\xdd\xff\xff\xff\xff",
        b"\x9f" + b"\xc0" * 15,
        b"\xdf\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\x8c" + b"\x80" * 12,
        b"\x81\xa1a" * 5000,
        b"\xc7\x0c\xff" + b"\xff" * 12,
        b"\xd6\x05abcd",
        b"\x81\x01\x02",
    ],
    ids=[
        "nested",
        "array32",
        "array",
        "map32",
        "bin32",
        "maps",
        "nested maps",
        "timestamp",
        "extension",
        "number as key",
    ],
)
def test_what_msgpack_has_and_the_schema_has_not_is_malformed(bomb):
    for decode in (decode_plan, decode_result):
        with pytest.raises(Malformed, match="no msgpack map|other keys"):
            decode(bomb)


@pytest.mark.parametrize("name", [*PLAN])
def test_every_key_of_a_plan_must_stand_once_and_hold_its_type(steps, name):
    good = msgpack.unpackb(encode_plan(steps.plan(11)))
    for value in (None, 1.5, "x", {}, 1 if isinstance(good[name], bool) else True):
        with pytest.raises(Malformed):
            decode_plan(msgpack.packb(good | {name: value}))
    with pytest.raises(Malformed, match="other keys"):
        decode_plan(msgpack.packb({key: good[key] for key in good if key != name}))
    with pytest.raises(Malformed, match="other keys"):
        decode_plan(msgpack.packb({key.replace(name, "more"): good[key] for key in good}))
    twice = msgpack.packb(good)[1:] + msgpack.packb(name) + msgpack.packb(good[name])
    with pytest.raises(Malformed):
        decode_plan(bytes([0x80 | (len(good) + 1)]) + twice)


@pytest.mark.parametrize("name", ["logprob", "rank", "top_ids", "top_logprobs"])
def test_a_full_result_is_whole_and_of_one_length(steps, name):
    good = msgpack.unpackb(encode_result(steps.result(4)))
    assert good.keys() == RESULT.keys() and len(good[name]) > 4
    for value in (None, good[name][4:], good[name] + b"\0" * 4):
        with pytest.raises(Malformed):
            decode_result(msgpack.packb(good | {name: value}))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_tokens": 1000}, "tokens that its rows"),
        ({"num_points": 1000}, "points that its rows"),
        ({"step": -1}, "before the first"),
        ({"rows": b"\xff" * 24}, "negative"),
        ({"rows": b"\0" * 23}, "multiple of 24"),
        ({"tokens": b"\0\0\0\0"}, "sizes than they say"),
        ({"loads": b""}, "not there"),
    ],
)
def test_a_plan_that_says_of_itself_what_it_is_not_is_malformed(steps, change, words):
    seed = next(k for k in range(99) if len(steps.plan(k).loads) > 1 and len(steps.plan(k).rows) > 1)
    good = msgpack.unpackb(encode_plan(steps.plan(seed)))
    with pytest.raises(Malformed, match=words):
        decode_plan(msgpack.packb(good | change))


ROW = np.array([[0, 3, 3, 1, 1, 1]], np.int32)
LOADED = Load(0, np.arange(5, dtype=np.int32), np.array([7], np.int32), Draw(*[1] * 10, ((1, 2.0),), 1, (4,), -1))


def one(change=lambda rows: None, one_token=False, plain=False, **load) -> StepPlan:
    """A plan of one row and one load, its sums right whatever is changed."""
    rows = ROW.copy()
    change(rows[0])
    loads = (dataclasses.replace(LOADED, **load),)
    return StepPlan(1, rows, loads, int(rows[0, COUNT]), int(rows[0, 4:].sum()), one_token, plain)


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (SCORE, 3, "more points than tokens"),
        (DRAW, 2, "more points than tokens"),
        (COUNT, -1, "negative"),
        (START, -1, "negative"),
        (BLOCK, -2, "negative"),
    ],
)
def test_a_row_that_cannot_be_is_malformed(place, value, words):
    assert same(decode_plan(encode_plan(one())), one())
    with pytest.raises(Malformed, match=words):
        decode_plan(encode_plan(one(lambda row: row.__setitem__(place, value))))


def test_rows_of_several_tokens_are_no_plan_of_one_token():
    with pytest.raises(Malformed, match="rows of more than one token"):
        decode_plan(encode_plan(one(one_token=True)))


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [("row", -1, "negative size or row"), ("num_tokens", -1, "negative size"), ("num_stops", 2, "than they say")],
)
def test_a_load_that_cannot_be_is_malformed(field, value, words):
    good = msgpack.unpackb(encode_plan(one()))
    record = np.frombuffer(good["loads"], LOAD).copy()
    record[field] = value
    with pytest.raises(Malformed, match=words):
        decode_plan(msgpack.packb(good | {"loads": record.tobytes()}))
    with pytest.raises(Malformed, match="biases without their values"):
        decode_plan(msgpack.packb(good | {"bias_values": b""}))


def test_a_switch_of_a_result_is_0_or_1(steps):
    good = msgpack.unpackb(encode_result(steps.result(1)))
    with pytest.raises(Malformed, match="one switch a point"):
        decode_result(msgpack.packb(good | {"finite": b"\2" * len(good["finite"])}))


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (one(lambda row: row.__setitem__(START, 63)), "past those of this lane"),
        (one(lambda row: row.__setitem__(BLOCK, 40)), "past those of this lane"),
        (one(lambda row: row.__setitem__(ROW_OF, 16)), "past those of this lane"),
        (one(lambda row: row.__setitem__(COUNT, 601)), "more tokens than a step"),
        (one(row=16), "larger than a row"),
        (one(tokens=np.zeros(65, np.int32)), "larger than a row"),
        (one(blocks=np.ones(17, np.int32)), "larger than a row"),
        (one(tokens=np.array([997], np.int32)), "past the vocabulary"),
        (one(tokens=np.array([-1], np.int32)), "past the vocabulary"),
        (one(blocks=np.array([40], np.int32)), "past the pool"),
    ],
)
def test_a_plan_that_would_touch_what_the_lane_does_not_have_is_refused(steps, plan, words):
    check_plan(one(), steps.HEADER.bounds)
    with pytest.raises(Malformed, match=words):
        check_plan(decode_plan(encode_plan(plan)), steps.HEADER.bounds)


@pytest.mark.parametrize("name", ["num_blocks", "max_rows", "max_length", "max_tokens", "vocab"])
def test_a_plan_of_a_larger_lane_is_refused(steps, name):
    plans = [steps.plan(seed) for seed in range(40)]
    smaller = steps.HEADER.bounds._replace(**{name: 9})
    refused = 0
    for plan in plans:
        check_plan(plan, steps.HEADER.bounds)
        try:
            check_plan(plan, smaller)
        except Malformed:
            refused += 1
    assert refused > 10


def test_a_message_larger_than_a_reader_takes_is_refused_on_both_sides():
    many = np.zeros(MAX_BYTES // 4, np.int32)
    with pytest.raises(Malformed, match="at most"):
        encode_result(StepResult(1, many, np.ones(1, bool)))
    with pytest.raises(Malformed, match="at most"):
        decode_result(bytes(MAX_BYTES + 1))
