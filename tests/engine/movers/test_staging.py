"""Memory that a library reads and writes: slots come back, what arrived is read-only, a device's has an address."""

import gc
from typing import NamedTuple

import jax
import numpy as np
import pytest

from engine.movers.staging import Landing, Region, Staging, region_of


def test_slots_of_staging_are_written_given_and_taken_again():
    staging = Staging(1 << 12)
    first, second = staging.take(2000), staging.take(2048)
    assert (first, second) == (0, 2048 - 2048 % 64) or second % 64 == 0
    assert staging.take(100) is None
    staging.room(second, second + 3)[:] = 1, 2, 3
    assert staging.give(first) and not staging.give(first) and staging.take(2000) == first
    assert staging.room(second, second + 3).tolist() == [1, 2, 3]
    staging.slots.check()


def test_a_slot_where_something_landed_is_free_when_nobody_holds_a_view_of_it():
    landing = Landing(1 << 12)
    first, second = landing.cut(1024), landing.cut(3072)
    assert landing.cut(64) is None
    view = first[100:].view(np.uint16)
    del first
    assert landing.cut(64) is None
    del view
    third = landing.cut(1000)
    assert third.ctypes.data == landing.region.address and landing.cut(64) is None
    assert second.ctypes.data == third.ctypes.data + 1024
    landing.slots.check()


def test_what_landed_cannot_be_written_and_outlives_the_landing():
    landing = Landing(1 << 12)
    found = landing.cut(64)
    with pytest.raises(ValueError, match="cannot set WRITEABLE"):
        found.setflags(write=True)
    del landing
    gc.collect()
    assert not found.any()


def test_nothing_is_no_slot():
    assert Landing(1 << 12).cut(0) is None and Staging(1 << 12).take(0) is None


class Device(NamedTuple):
    platform: str
    local_hardware_id: int | None


class OnDevice(NamedTuple):
    nbytes: int
    device: Device

    def unsafe_buffer_pointer(self):
        return 1 << 40


def test_memory_of_a_device_is_told_by_its_number():
    assert region_of(OnDevice(512, Device("gpu", 3))) == Region(1 << 40, 512, "VRAM", 3)
    assert region_of(OnDevice(512, Device("cpu", 3))) == Region(1 << 40, 512, "DRAM", 0)


def test_a_jax_array_on_the_host_is_read_where_it_lies():
    array = jax.block_until_ready(jax.numpy.arange(4096, dtype=np.uint8))
    (shard,) = array.addressable_shards
    address, num_bytes, memory, _ = region_of(shard.data)
    assert (num_bytes, memory) == (4096, "DRAM") and address == shard.data.unsafe_buffer_pointer()
