"""Orders and answers come back as they were; bytes that are none of them are refused, all alike."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.core.plan import Draw, Load, StepPlan, StepResult
from engine.errors import Malformed
from engine.movers.frames import PREFIX, check_header, read_prefix
from engine.replica import orders
from engine.replica.orders import FIELDS, PLAN, digest, from_frame, to_frame

NUMBERS = st.integers(0, 2**63 - 1)
NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
BLOCKS = st.lists(st.integers(0, 2**31), max_size=40).map(tuple)
ADDRESSES = st.lists(NAMES, max_size=9).map(tuple)
DRAWN = {  # how each field of an order or an answer is drawn
    orders.Gather: (BLOCKS,),
    orders.Send: (NAMES, *[NUMBERS] * 4),
    orders.Scatter: (*[NUMBERS] * 3, BLOCKS),
    orders.Drop: [NUMBERS] * 3,
    orders.Reset: (),
    orders.Born: (NAMES,),
    orders.Known: (NAMES, ADDRESSES, st.integers(1, 4096)),
    orders.Forget: (NAMES,),
    orders.Go: (),
    orders.Beat: (),
    orders.At: (ADDRESSES,),
    orders.Drawn: (NUMBERS, NUMBERS),
    orders.Have: (NAMES, *[NUMBERS] * 4, st.integers(0, 1)),
    orders.Here: (NAMES,),
    orders.Unable: (NAMES,),
}
ANY = st.one_of(*(st.builds(kind, *fields) for kind, fields in DRAWN.items()))
quick = settings(max_examples=100, deadline=None, derandomize=True)


def plan(rows=3, loads=2):
    lines = np.array([[row, 5, 1, row % 2, 0, 1] for row in range(rows)], np.int32).reshape(rows, 6)
    tokens, blocks = np.arange(6, dtype=np.int32), np.array([4], np.int32)
    draw = Draw(5, 0, 6, 0.7, 4, 0.9, 0.1, 1.0, 0.5, 0.25, ((3, 1.5),), 7, (2, 4), 3)
    return StepPlan(
        9, lines, tuple(Load(row, tokens, blocks, draw) for row in range(loads)), rows, rows, True, True
    )


def back(data):
    """As a channel reads it."""
    prefix = read_prefix(data, 1 << 20, 0)
    check_header(prefix, data[PREFIX:])
    return from_frame(prefix.kind, data[PREFIX:])


def test_each_kind_of_order_is_drawn_here():
    assert {kind for kind, _ in FIELDS.values()} == set(DRAWN) and PLAN not in FIELDS


@quick
@given(ANY)
def test_every_order_comes_back_as_it_was(order):
    found = back(to_frame(order))
    assert found == order and type(found) is type(order)


@quick
@given(st.integers(0, 2**64 - 1), st.integers(0, 9), st.integers(0, 3))
def test_a_plan_comes_back_with_its_number(number, rows, loads):
    sent = orders.Plan(number, plan(rows, loads))
    found = back(to_frame(sent))
    assert found.number == number and (found.plan.rows == sent.plan.rows).all()
    for field in dataclasses.fields(StepPlan):
        if field.name not in ("rows", "loads"):
            assert getattr(found.plan, field.name) == getattr(sent.plan, field.name)
    for there, here in zip(found.plan.loads, sent.plan.loads, strict=True):
        assert there.row == here.row and there.draw == here.draw
        assert (there.tokens == here.tokens).all() and (there.blocks == here.blocks).all()


@settings(quick, max_examples=300)
@given(st.one_of(ANY, st.builds(lambda rows: orders.Plan(7, plan(rows)), st.integers(0, 5))), st.data())
def test_mutated_bytes_are_an_order_or_malformed(order, data):
    """Nothing else is raised, whatever is changed, cut or put in behind the checksums."""
    whole = to_frame(order)
    kind = read_prefix(whole).kind
    header = bytearray(whole[PREFIX:])
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(header)))
        change = data.draw(st.sampled_from(("flip", "cut", "put", "kind")))
        if change == "flip" and place < len(header):
            header[place] = data.draw(st.integers(0, 255))
        elif change == "cut":
            del header[place : place + data.draw(st.integers(1, 20))]
        elif change == "put":
            header[place:place] = data.draw(st.binary(min_size=1, max_size=9))
        elif change == "kind":
            kind = data.draw(st.sampled_from([*FIELDS, PLAN, 0, 1, 139, 65535]))
    try:
        found = from_frame(kind, bytes(header))
    except Malformed:
        return
    assert isinstance(found, FIELDS[kind][0] if kind in FIELDS else orders.Plan)


@pytest.mark.parametrize("place", [0, 5, 9, 20, PREFIX - 1, PREFIX, -1])
def test_a_flipped_bit_on_the_way_is_noticed(place):
    data = bytearray(to_frame(orders.Drawn(4, 5)))
    data[place] ^= 4
    with pytest.raises(Malformed):
        back(bytes(data))


def test_a_plan_shorter_than_its_number_and_a_kind_of_others_are_refused():
    with pytest.raises(Malformed, match="without its number"):
        from_frame(PLAN, b"1234567")
    with pytest.raises(Malformed, match="expected one of those of a lane"):
        from_frame(80, b"\x80")


def test_a_follower_may_have_its_part_whole_or_not_and_nothing_between():
    have = orders.Have("p0", 1, 2, 3, 4, 2)
    with pytest.raises(Malformed, match="0..1"):
        back(to_frame(have))


def test_a_digest_tells_apart_whatever_clients_would_see():
    tokens, finite = np.array([3, 4], np.int32), np.ones(2, bool)
    one = digest(StepResult(1, tokens, finite))
    assert one == digest(StepResult(2, tokens.copy(), finite.copy())), "what it was drawn in does not count"
    others = [
        (tokens[::-1], finite),
        (tokens + 1, finite),
        (tokens, np.array([True, False])),
        (tokens[:1], finite[:1]),
    ]
    assert len({one, *(digest(StepResult(1, *each)) for each in others)}) == 1 + len(others)
    assert 0 <= one < 2 ** (8 * orders.DIGEST)
