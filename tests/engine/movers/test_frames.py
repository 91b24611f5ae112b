"""A frame is taken whole and right, or refused."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import Malformed
from engine.movers.frames import MAX_PAYLOAD, PREFIX, Versions, check_header, frame, read_prefix
from engine.observe.plan_bytes import MAX_BYTES


def read(data):
    prefix = read_prefix(data[:PREFIX].ljust(PREFIX, b"\0"))
    header = data[PREFIX : PREFIX + prefix.header]
    check_header(prefix, header)
    return prefix.kind, bytes(header), prefix.payload


def test_a_frame_says_what_it_was_made_of():
    assert read(frame(17, b"header", 99)) == (17, b"header", 99)
    assert read(frame(0, b"")) == (0, b"", 0)


@pytest.mark.parametrize("bit", range(8))
def test_no_flipped_bit_goes_unnoticed(bit):
    good = frame(17, b"some header", 1 << 20)
    for place in range(len(good)):
        bad = bytearray(good)
        bad[place] ^= 1 << bit
        with pytest.raises(Malformed):
            read(bad)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.binary(max_size=200), st.binary(max_size=80), st.data())
def test_other_bytes_are_refused(noise, header, data):
    good = frame(17, header, 5)
    for bad in (noise, good[: data.draw(st.integers(0, len(good) - 1))], noise + good if noise else b"x"):
        with pytest.raises(Malformed):
            read(bad)


def test_a_claim_of_four_gigabytes_is_refused_before_anything_is_read():
    claimed = frame(17, b"x", MAX_PAYLOAD + 1)
    with pytest.raises(Malformed, match=f"payload of {MAX_PAYLOAD + 1} bytes; expected at most {MAX_PAYLOAD}"):
        read_prefix(claimed)
    with pytest.raises(Malformed, match=r"header of 5 bytes; expected at most 4$"):
        read_prefix(frame(17, b"12345"), 4, 0)
    assert MAX_BYTES < 1 << 32


def test_another_version_is_named():
    with pytest.raises(Malformed, match="protocol version 2; expected 1"):
        read(frame(17, b"", version=2))
    assert read_prefix(frame(17, b"", version=2), version=2).kind == 17


def test_two_speak_the_highest_version_that_both_know():
    assert Versions(1, 1).agreed(Versions(2, 1)) == 1 == Versions(2, 1).agreed(Versions(1, 1))
    assert Versions(3, 2).agreed(Versions(3, 2)) == 3 and Versions(3, 2).agreed(Versions(2, 1)) == 2
    assert Versions(3, 2).agreed(Versions(1, 1)) is None is Versions(1, 1).agreed(Versions(3, 2))
