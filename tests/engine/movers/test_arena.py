"""One segment, two ends: slots never overlap, nothing shrinks, and a slot is free when nobody holds its array."""

import ctypes
import fcntl
import functools
import gc
import mmap
import os
import random
import threading

import numpy as np
import pytest

from engine.errors import Malformed
from engine.movers.arena import ALIGNED, MOST_SLOTS, Arena, Borrowed, Slots

SIZE = 1 << 20


class Ends:
    """Both of them, in one process."""

    def __init__(self, size=SIZE):
        self.calls = []
        self.arena = Arena(size)
        self.borrowed = Borrowed(self.arena.descriptor, size, functools.partial(self.calls.append, 1))


@pytest.fixture
def ends():
    made = Ends()
    yield made
    made.arena.close()


def sealed(size, seals=fcntl.F_SEAL_SHRINK):
    descriptor = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, size)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    return descriptor


def test_what_is_written_at_one_end_is_read_at_the_other_and_cannot_be_written_there(ends):
    offset = ends.arena.take(1000)
    ends.arena.room(offset, offset + 1000)[:] = np.arange(1000) % 251
    found = ends.borrowed.cut(offset, 1000)
    assert found.ctypes.data % ALIGNED == 0 and (found == np.arange(1000) % 251).all()
    with pytest.raises(ValueError, match="read-only|WRITEABLE"):
        found[0] = 1
    with pytest.raises(ValueError, match="cannot set WRITEABLE"):
        found.setflags(write=True)


def test_slots_that_are_taken_and_given_in_any_order_never_overlap():
    rng, slots, used = random.Random(1), Slots(SIZE), {}
    for _ in range(3000):
        if used and rng.random() < 0.5:
            offset = rng.choice(list(used))
            del used[offset]
            assert slots.remove(offset)
        else:
            size = rng.choice([1, 64, 1000, rng.randrange(1, SIZE // 4)])
            offset = slots.find(size)
            if offset is not None:
                assert all(offset >= stop or offset + size <= start for start, stop in used.items())
                used[offset] = offset + size
                assert slots.add(offset, size)
        slots.check()
    for offset in used:
        assert slots.remove(offset)
    assert slots.find(SIZE) == 0 and len(slots) == 0


def test_the_lowest_room_is_taken_first_and_no_more_than_there_is(ends):
    first, second, third = (ends.arena.take(SIZE // 4) for _ in range(3))
    assert (first, second, third) == (0, SIZE // 4, SIZE // 2)
    ends.arena.give(second)
    assert ends.arena.take(SIZE // 2) is None and ends.arena.take(SIZE // 4 + 1) is None
    assert ends.arena.take(SIZE // 4) == second
    assert ends.arena.take(SIZE // 4) == 3 * SIZE // 4 and ends.arena.take(1) is None


def test_slots_are_bounded_in_number():
    slots = Slots(SIZE)
    for number in range(MOST_SLOTS):
        assert slots.add(number * ALIGNED, 1)
    assert slots.find(1) is None and not slots.add(MOST_SLOTS * ALIGNED, 1)


PLACES = [(1, 64), (63, 1), (0, SIZE + 1), (SIZE, 1), (2**63, 64), (0, 0), (64, 65), (128, 64)]


@pytest.mark.parametrize(("offset", "size"), PLACES)
def test_a_slot_that_cannot_be_is_refused(ends, offset, size):
    held = ends.borrowed.cut(128, 64)
    with pytest.raises(Malformed, match="out of bounds, not aligned, or over"):
        ends.borrowed.cut(offset, size)
    assert held is not None and ends.borrowed.freed() == []


def test_a_slot_that_was_not_in_use_cannot_be_given_back(ends):
    offset = ends.arena.take(64)
    ends.arena.give(offset)
    with pytest.raises(Malformed, match="not in use"):
        ends.arena.give(offset)


def test_a_slot_is_free_when_the_last_view_is_gone_whatever_it_was_made_of(ends):
    root = ends.borrowed.cut(0, 4096)
    view = root[:2048].view(np.float16).reshape(2, 8, 64)
    half = np.split(view, 2)[1]
    through = memoryview(half)
    del root, view
    assert ends.borrowed.freed() == [] and not ends.calls
    del half
    assert not ends.borrowed.pending
    through.release()
    del through
    assert ends.calls == [1] and ends.borrowed.freed() == [0] and ends.borrowed.freed() == []
    assert ends.borrowed.cut(0, 4096) is not None


def test_slots_are_free_in_the_order_in_which_their_arrays_die_on_any_thread(ends):
    held = {offset: ends.borrowed.cut(offset, 64) for offset in (0, 64, 128, 192)}
    del held[128]
    thread = threading.Thread(target=lambda: held.pop(0))
    thread.start()
    thread.join()
    ring = [held.pop(192)]
    ring.append(ring)
    del ring
    assert ends.borrowed.freed() == [128, 0]
    gc.collect()
    assert ends.borrowed.freed() == [192]


def test_an_array_outlives_both_ends(ends):
    ends.arena.room(0, 64)[:] = 7
    found = ends.borrowed.cut(0, 64)
    ends.arena.close()
    del ends.borrowed
    assert (found == 7).all()


def test_both_ends_leave_nothing_behind():
    Ends().arena.close()
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(10):
        made = Ends()
        made.borrowed.cut(0, 64)
        made.arena.close()
        del made
    assert len(os.listdir("/proc/self/fd")) == before


def test_memory_that_may_shrink_is_refused():
    for descriptor in (sealed(SIZE, 0), sealed(SIZE, fcntl.F_SEAL_GROW), *os.pipe()):
        with pytest.raises(Malformed, match="expected it sealed|no shared memory"):
            Borrowed(descriptor, SIZE, lambda: None)
        os.close(descriptor)


@pytest.mark.parametrize("size", [0, SIZE + 1, 1 << 62])
def test_memory_of_another_size_is_refused(size):
    descriptor = sealed(SIZE)
    with pytest.raises(Malformed, match="memory that has others"):
        Borrowed(descriptor, size, lambda: None)
    os.close(descriptor)


def test_the_writer_cannot_take_the_memory_away_any_more(ends):
    for size in (0, SIZE - mmap.PAGESIZE, 2 * SIZE):
        with pytest.raises(PermissionError):
            os.ftruncate(ends.arena.descriptor, size)


def test_pages_come_when_they_are_written(ends):
    def blocks():
        return os.fstat(ends.arena.descriptor).st_blocks * 512

    assert blocks() == 0
    ends.arena.room(0, 1)
    assert blocks() == mmap.PAGESIZE
    ends.arena.room(0, SIZE // 2)
    assert blocks() == SIZE // 2


def test_where_there_is_no_memory_for_pages_that_is_an_error_and_no_signal(ends, monkeypatch):
    def none_left(*_):
        raise OSError(28, "none left")

    monkeypatch.setattr(os, "posix_fallocate", none_left)
    with pytest.raises(OSError, match="none left"):
        ends.arena.room(0, 64)


def test_a_system_without_such_memory_is_an_error(monkeypatch):
    monkeypatch.delattr(os, "memfd_create")
    with pytest.raises(OSError, match="no memory to share"):
        Arena(SIZE)


def test_an_array_that_jax_took_over_keeps_its_slot(ends):
    jax = pytest.importorskip("jax")
    ends.arena.room(0, SIZE)[:] = 3
    found = ends.borrowed.cut(0, SIZE).view(np.float32)
    address = found.ctypes.data
    array = jax.block_until_ready(jax.device_put(found, jax.devices("cpu")[0]))
    aliased = array.unsafe_buffer_pointer() == address
    del found
    gc.collect()
    assert ends.borrowed.pending == (not aliased)
    assert ctypes.c_uint8.from_address(array.unsafe_buffer_pointer()).value == 3
    del array
    gc.collect()
    assert ends.borrowed.freed() == [0]
