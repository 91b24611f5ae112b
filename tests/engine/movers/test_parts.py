"""KV on its way: in one order whatever its shards, into aligned buffers, never damaged without being noticed."""

import ml_dtypes
import msgpack
import numpy as np
import pytest
from drawn_messages import GEOMETRY, Drawn, same
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.core.handoff import CREDIT, Parts
from engine.errors import ConfigError, Malformed
from engine.movers.parts import (
    ALIGNED,
    FIELDS,
    Heads,
    Intake,
    header_of,
    num_bytes,
    read_header,
    sums_by_head,
    views,
)


def sent(part):
    """(header, payload) as they stand on a connection."""
    return header_of(part, list(sums_by_head(part))), b"".join(bytes(view) for view in views(part))


def received(header, payload, geometry=GEOMETRY):
    intake = Intake(read_header(header, len(payload)), len(payload), geometry)
    if not intake.fits:
        return intake.header.without()
    start = 0
    for view in intake.views():
        view[:] = payload[start : start + len(view)]
        start += len(view)
    return intake.header.without() if any(intake.damaged_heads()) else intake.part()


def split(part, *, wider=0):
    """As two shards that are cut out of larger arrays."""
    found = []
    for heads in (slice(0, 1), slice(1, None)):
        room = [np.pad(each, [(0, 0), (0, 0), (0, wider), (0, 0), (0, 0)])[heads] for each in part.staged[:2]]
        found.append(Heads(*(array[:, :, : part.num_blocks] for array in room), heads.start))
    return part._replace(staged=tuple(found))


@pytest.mark.parametrize("seed", range(5))
def test_parts_come_back_as_they_were(seed):
    part = Drawn(seed).parts()
    assert same(received(*sent(part)), part)


def test_bfloat16_comes_back_as_it_was():
    part = Drawn(3).parts()
    part = part._replace(staged=Heads(*(array.astype(ml_dtypes.bfloat16) for array in part.staged[:2])))
    assert same(received(*sent(part), GEOMETRY._replace(dtype="bfloat16")), part)
    assert received(*sent(part)).staged is None


@pytest.mark.parametrize("wider", [0, 3])
def test_shards_and_cuts_of_larger_arrays_are_the_same_bytes(wider):
    part = Drawn(1).parts()
    assert sent(split(part, wider=wider)) == sent(part)
    assert num_bytes(split(part)) == num_bytes(part) == len(sent(part)[1])


def test_the_payload_is_keys_then_values_head_first():
    part = Drawn(2).parts()
    assert sent(part)[1] == part.staged[0].tobytes() + part.staged[1].tobytes()


def test_nothing_is_copied_to_be_sent():
    part = Drawn(1).parts()
    for view, array in zip(views(part), part.staged[:2], strict=True):
        assert np.frombuffer(view, np.uint8).ctypes.data == array.ctypes.data


def test_what_comes_is_aligned_read_only_and_in_buffers_of_its_own():
    keys, values, _ = received(*sent(Drawn(4).parts())).staged
    for array in (keys, values):
        assert array.ctypes.data % ALIGNED == 0 and not array.flags.writeable and array.flags.c_contiguous
    assert not np.shares_memory(keys, values)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.integers(0, 50), st.data())
def test_any_damage_to_the_payload_is_noticed(seed, data):
    part = Drawn(seed).parts()
    header, payload = sent(part)
    bad = bytearray(payload)
    for _ in range(data.draw(st.integers(1, 3))):
        bad[data.draw(st.integers(0, len(bad) - 1))] ^= data.draw(st.integers(1, 255))
    got = received(header, bytes(bad))
    assert same(got, part) if bad == payload else same(got, part._replace(staged=None))


def test_some_of_the_heads_come_back_as_they_were():
    part = Drawn(5).parts()
    some = part._replace(staged=Heads(*(array[1:3] for array in part.staged[:2]), 1))
    got = received(*sent(some))
    assert same(got, some) and got.staged.first_head == 1 and got.staged.stop_head == 3
    past = some._replace(staged=some.staged._replace(first_head=GEOMETRY.kv_heads - 1))
    assert received(*sent(past)).staged is None, "of heads that no lane has"


def test_payloads_of_two_parts_that_change_places_are_noticed():
    one, other = Drawn(1).parts(), Drawn(2).parts()
    other = other._replace(staged=Heads(*one.staged[1::-1]), num_blocks=one.num_blocks)
    assert received(sent(one)[0], sent(other)[1]).staged is None


UNLIKE = {
    "a dtype of as many bytes": GEOMETRY._replace(dtype="int16"),
    "a wider dtype": GEOMETRY._replace(dtype="float32"),
    "more layers": GEOMETRY._replace(layers=3),
    "heads and layers the other way round": GEOMETRY._replace(layers=4, kv_heads=2),
    "other blocks of as many bytes": GEOMETRY._replace(block_size=8, head_width=4),
}


@pytest.mark.parametrize("name", UNLIKE)
def test_kv_of_another_geometry_is_delivered_without_blocks(name):
    part = Drawn(1).parts()
    assert same(received(*sent(part), UNLIKE[name]), part._replace(staged=None))


def test_a_part_without_blocks_crosses_as_one():
    part = Parts(1, 2, 3, 4, None)
    assert same(received(*sent(part)), part)


def test_headers_that_say_what_is_not_are_refused():
    header, payload = sent(Drawn(1).parts())
    good = msgpack.unpackb(header)
    for change in (
        {"su": good["su"][8:]},
        {"k": 5},
        {"nb": CREDIT + 1},
        {"nb": 0},
        {"l": 1 << 40},
        {"dt": 5},
        {"x": 1},
    ):
        with pytest.raises(Malformed):
            read_header(msgpack.packb({**good, **change}), len(payload))
    with pytest.raises(Malformed, match="without blocks"):
        read_header(header, 0)
    assert good.keys() == FIELDS.schema.keys()


def test_a_dtype_that_numpy_does_not_know_is_named():
    with pytest.raises(ConfigError, match="float17"):
        GEOMETRY._replace(dtype="float17").numpy_dtype()


def test_the_first_difference_between_two_lanes_is_named():
    assert GEOMETRY.difference(GEOMETRY) == ""
    for field, value in GEOMETRY._asdict().items():
        other = GEOMETRY._replace(**{field: 7 if isinstance(value, int) else "another"})
        assert GEOMETRY.difference(other).startswith(
            f"geometry: {field} is {other._asdict()[field]} there and {value} here"
        )
