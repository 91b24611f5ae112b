"""Messages come back as they were; bytes that are none of them are refused, all alike."""

import math

import msgpack
import pytest
from drawn_messages import Drawn, same
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.core import membership, messages
from engine.core.events import Emission
from engine.core.session import Packet
from engine.errors import Malformed, OutOfBlocks, Unavailable
from engine.movers.words import KINDS, NUMBERS, from_bytes, to_bytes

SEEDS = st.integers(0, 2**32)
quick = settings(max_examples=60, deadline=None, derandomize=True)


@pytest.mark.parametrize("kind", [kind for kind, _ in KINDS.values()], ids=lambda kind: kind.__name__)
def test_every_message_comes_back_as_it_was(kind):
    for seed in range(60):
        message = Drawn(seed).any(kind)
        assert same(from_bytes(*to_bytes(message, 64.0), 64.0), message)


def test_everything_that_a_front_and_a_lane_say_has_a_kind():
    said = {*messages.ToLane.__args__, *messages.ToFront.__args__, *membership.Said.__args__}
    said |= set(membership.Answered.__args__)
    assert said <= NUMBERS.keys() and len(NUMBERS) == len(KINDS)


def test_deadlines_travel_as_the_seconds_that_are_left():
    """The clock of the other machine shows something else."""
    request = Drawn(3).request()
    for deadline, there in ((105.5, 7.5), (95.0, -3.0)):
        kind, data = to_bytes(messages.Prefill(1, "d", _due(request, deadline)), 100.0)
        assert from_bytes(kind, data, 2.0).request.deadline_at == there
    carried = Packet(1, 2, 3, messages.Prefill(1, "d", _due(request, 99.0)))
    assert from_bytes(*to_bytes(carried, 100.0), 2.0).message.request.deadline_at == 1.0


def _due(request, deadline_at):
    return type(request)(*(deadline_at if f == "deadline_at" else getattr(request, f) for f in request.__slots__))


def test_an_error_of_a_class_that_the_tree_does_not_have_crosses_as_the_next_above():
    class Odd(OutOfBlocks):
        pass

    back = from_bytes(*to_bytes(messages.Over(1, "error", None, Odd("none left", field="n")), 0.0), 0.0).error
    assert type(back) is OutOfBlocks and (str(back), back.field, back.retry_after_s) == ("none left", "n", 1.0)
    long = messages.Failed(1, "error", Unavailable("é" * 9000))
    assert len(str(from_bytes(*to_bytes(long, 0.0), 0.0).error).encode()) <= 4096


@settings(quick, max_examples=500)
@given(SEEDS, st.data())
def test_mutated_bytes_are_a_message_of_the_schema_or_malformed(seed, data):
    drawn = Drawn(seed)
    number, good = to_bytes(drawn.any(drawn.rng.choice([kind for kind, _ in KINDS.values()])), 0.0)
    bad = bytearray(good)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(bad)))
        change = data.draw(st.sampled_from(("flip", "cut", "put", "repeat")))
        if change == "flip" and place < len(bad):
            bad[place] = data.draw(st.integers(0, 255))
        elif change == "cut":
            del bad[place : place + data.draw(st.integers(1, 40))]
        elif change == "put":
            bad[place:place] = data.draw(st.binary(max_size=12))
        else:
            bad[place:place] = bad[: data.draw(st.integers(0, 40))]
    try:
        message = from_bytes(data.draw(st.sampled_from([number, *KINDS])), bytes(bad), 0.0)
    except Malformed as error:
        assert len(str(error)) > 10
    else:
        assert same(from_bytes(*to_bytes(message, 0.0), 0.0), message)


@quick
@given(SEEDS, st.data())
def test_values_of_another_kind_are_a_message_or_malformed(seed, data):
    """The map is whole, one of its values is something else."""
    drawn = Drawn(seed)
    number, good = to_bytes(drawn.any(drawn.rng.choice([kind for kind, _ in KINDS.values()])), 0.0)
    entries = msgpack.unpackb(good)
    other = st.one_of(
        st.integers(-(2**63), 2**64 - 1),
        st.floats(),
        st.binary(max_size=24),
        st.text(max_size=8),
        st.none(),
        st.booleans(),
    )
    entries[data.draw(st.sampled_from(sorted(entries)))] = data.draw(other)
    try:
        message = from_bytes(number, msgpack.packb(entries), 0.0)
    except Malformed as error:
        assert str(error)
    else:
        assert same(from_bytes(*to_bytes(message, 0.0), 0.0), message)


CANCEL = {"ss": b"", "h": 3, "re": "x"}
BAD = {
    "a key that no schema has": {**CANCEL, "more": 1},
    "a key that is missing": {"ss": b"", "h": 3},
    "a key that is no text": {**CANCEL, 5: 5},
    "an extension type": {**CANCEL, "h": msgpack.ExtType(4, b"x")},
    "a number beyond its bounds": {**CANCEL, "h": -1},
    "a number of 64 bits and a sign too many": {**CANCEL, "h": 2**63},
    "a switch for a number": {**CANCEL, "h": True},
    "a text beyond its bounds": {**CANCEL, "re": "x" * 5000},
    "bytes that are no integers": {**CANCEL, "ss": b"123"},
    "a list": {**CANCEL, "ss": [1]},
    "a map": {**CANCEL, "ss": {"ss": b""}},
}


@pytest.mark.parametrize("name", BAD)
def test_a_map_is_refused_for(name):
    with pytest.raises(Malformed):
        from_bytes(NUMBERS[messages.Cancel], msgpack.packb(BAD[name], strict_types=False), 0.0)


def test_bytes_that_claim_more_than_they_are_cost_nothing():
    for data in (
        b"\xdd\xff\xff\xff\xff",
        b"\x91" * 100_000,
        b"\xc6\xff\xff\xff\xff",
        b"",
        b"\x83\xa1h\x01\xa1h\x01\xa1h\x01",
    ):
        with pytest.raises(Malformed):
            from_bytes(NUMBERS[messages.Cancel], data, 0.0)


def test_a_kind_that_nobody_knows_and_one_that_no_packet_carries_are_refused():
    with pytest.raises(Malformed, match="kind"):
        from_bytes(999, b"\x80", 0.0)
    number, data = to_bytes(Packet(1, 2, 3, messages.Committed(4)), 0.0)
    entries = msgpack.unpackb(data)
    for kind, inner in ((NUMBERS[Packet], data), (0, b"\x80")):
        with pytest.raises(Malformed, match="sessions carry"):
            from_bytes(number, msgpack.packb({**entries, "mk": kind, "m": inner}), 0.0)
    with pytest.raises(Malformed, match="contradict"):
        from_bytes(number, msgpack.packb({**entries, "nu": 0}), 0.0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_refused(value):
    number, data = to_bytes(Drawn(1).submit(), 0.0)
    for key in ("te", "dl"):
        with pytest.raises(Malformed):
            from_bytes(number, msgpack.packb({**msgpack.unpackb(data), key: value}), 0.0)


def test_arrays_of_unlike_lengths_are_refused():
    number, data = to_bytes(Emission(*Drawn(1).columns(3)[1:2] * 3), 0.0)
    with pytest.raises(Malformed, match="contradict"):
        from_bytes(number, msgpack.packb({**msgpack.unpackb(data), "to": b"1234"}), 0.0)
