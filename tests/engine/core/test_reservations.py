"""Blocks kept for KV on its way."""

import pytest

from engine.core.blocks import BlockPool, Content
from engine.core.reservations import Reservations

A, AB, ABC = (Content(name, name) for name in (b"a", b"ab", b"abc"))


@pytest.fixture
def pool():
    """Five blocks; two of them published and idle."""
    pool = BlockPool(6)
    blocks = pool.take(2)
    for block, content in zip(blocks, (A, AB), strict=True):
        pool.publish(block, content)
    pool.drop(blocks)
    return pool


def test_what_is_found_by_prefix_is_shared_and_the_rest_is_written(pool):
    reserved = Reservations(pool)
    blocks, found = reserved.reserve(1, [A, AB, ABC], 4)
    assert found == 2 and len(set(blocks)) == 4 and reserved.held(1) == blocks
    assert reserved.writing(1) == pool.writing == 2 and pool.available == 1
    pool.check(reserved.blocks)


def test_without_room_nothing_changes(pool):
    reserved = Reservations(pool)
    assert reserved.reserve(1, [A, AB], 6) is None
    assert pool.available == 5 and pool.cached == 2 and not reserved.handoffs and not reserved.blocks
    assert reserved.reserve(1, [A, AB], 5) is not None, "shared blocks count as room"


def test_written_blocks_are_the_callers(pool):
    reserved = Reservations(pool)
    blocks, _ = reserved.reserve(1, [A], 3)
    with pytest.raises(AssertionError, match="published while it is written"):
        pool.publish(blocks[2], ABC)
    assert reserved.written(1) == blocks and not reserved.handoffs and pool.writing == 0
    pool.publish(blocks[2], ABC)
    pool.check(blocks)
    pool.drop(blocks)
    assert pool.available == 5


def test_blocks_that_may_be_written_cannot_become_free_but_by_their_handoff(pool):
    reserved = Reservations(pool)
    blocks, _ = reserved.reserve(1, [], 3)
    with pytest.raises(AssertionError, match="freed while it is written"):
        pool.drop(blocks)
    reserved.drop(1)
    reserved.drop(1)
    assert pool.available == 5 and pool.writing == 0 and reserved.writing(1) == 0


def test_each_handoff_has_its_own_blocks_but_for_a_prefix(pool):
    reserved = Reservations(pool)
    one, _ = reserved.reserve(1, [A], 2)
    two, _ = reserved.reserve(2, [A], 2)
    assert one[0] == two[0] and one[1] != two[1] and reserved.handoffs == {1, 2}
    pool.check(reserved.blocks)
    reserved.drop(1)
    assert reserved.held(2) == two and reserved.writing(2) == pool.writing == 1
    pool.check(reserved.blocks)
    with pytest.raises(AssertionError):
        reserved.reserve(2, [], 1)
