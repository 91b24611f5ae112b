"""Staged blocks between meshes of every ratio, and to the host."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from engine.errors import DeviceError
from engine.movers.checksums import checksums
from engine.movers.local import HEADS, Carrier, arrived, host_shards, to_host
from engine.runner.compiles import CompileCounter
from engine.runner.moves import Staged
from sharding.mesh import MeshSpec, lane_axes, lane_meshes
from sharding.overlap import overlaps

HEADS_OF_MODEL = 24


def lane(tp, kv_heads, offset=0):
    devices = jax.devices()[offset:] + jax.devices()[:offset]
    return lane_meshes(MeshSpec(tp=tp), HEADS_OF_MODEL, kv_heads, devices)[0]


def carrier(source, target, kv_heads, shared=None):
    axes = [(mesh.shape["kv"], mesh.shape["rep"]) for mesh in (source, target)]
    return Carrier(source, target, overlaps(kv_heads, *axes), shared)


def drawn(mesh, kv_heads, count=3, dtype=np.uint16, seed=0):
    rng = np.random.default_rng(seed)
    arrays = [rng.integers(0, 60000, (kv_heads, 2, count, 4, 8)).astype(dtype) for _ in range(2)]
    return Staged(*jax.device_put(arrays, NamedSharding(mesh, HEADS)))


PAIRS = [(1, 8), (8, 1), (2, 4), (4, 2), (2, 2), (8, 4)]
ALL = [(a, b) for a in (1, 2, 4, 8) for b in (1, 2, 4, 8)]


def expect_carried(kv_heads, source_tp, target_tp, dtype):
    source, target = lane(source_tp, kv_heads), lane(target_tp, kv_heads, 8 - target_tp)
    staged = drawn(source, kv_heads, dtype=dtype)
    for shared in (True, False):
        moved = carrier(source, target, kv_heads, shared).carry(staged)
        for before, after in zip(staged, moved, strict=True):
            assert after.sharding == NamedSharding(target, HEADS) and after.dtype == dtype
            whole = np.asarray(before)
            for shard in after.addressable_shards:
                assert np.array_equal(np.asarray(shard.data), whole[shard.index])


@pytest.mark.parametrize("kv_heads", [2, 8])
@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_every_device_gets_its_heads_for_any_ratio(pair, kv_heads):
    expect_carried(kv_heads, *pair, np.uint16)


@pytest.mark.parametrize("pair", [(2, 3), (3, 2), (6, 4), (4, 6)], ids=str)
def test_heads_that_two_meshes_cut_crosswise_arrive(pair):
    expect_carried(12, *pair, np.float32)


@pytest.mark.slow
@pytest.mark.parametrize("kv_heads", [1, 2, 8])
@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
@pytest.mark.parametrize("pair", ALL, ids=str)
def test_every_pair_of_meshes_carries(pair, kv_heads, dtype):
    """Costs half a minute."""
    expect_carried(kv_heads, *pair, dtype)


def test_a_carry_waits_for_nothing():
    """The arrays are still being made when it returns, and those it returns are not there either."""
    source, target = lane(2, 8), lane(4, 8, 4)
    way, staged = carrier(source, target, 8), drawn(source, 8)
    way.warm_up([staged])

    def slowly(array):
        x = jnp.ones((400, 400), jnp.float32)
        x = jax.lax.fori_loop(0, 300, lambda _, x: jnp.tanh(x @ x), x)
        return array + (x[0, 0] > 9).astype(array.dtype)

    late = jax.jit(lambda staged: Staged(*map(slowly, staged)), out_shardings=staged[0].sharding)
    jax.block_until_ready(late(staged))
    pending = late(staged)
    moved = way.carry(pending)
    waited = pending.keys_KLnCH.is_ready()
    assert not waited and not arrived(moved)
    jax.block_until_ready(moved)
    assert np.array_equal(np.asarray(moved.values_KLnCH), np.asarray(staged.values_KLnCH)) and arrived(moved)


def test_nothing_is_compiled_once_a_carrier_is_warm():
    ways = [(lane(a, 8), lane(b, 8, 8 - b)) for a, b in ((1, 2), (4, 2), (2, 2))]
    carriers = [carrier(source, target, 8) for source, target in ways]
    for way, (source, _) in zip(carriers, ways, strict=True):
        way.warm_up([drawn(source, 8, count) for count in (1, 4)])
    counter = CompileCounter()
    counter.seal()
    for seed in range(20):
        way, (source, _) = carriers[seed % 3], ways[seed % 3]
        staged = drawn(source, 8, (1, 4)[seed % 2], seed=seed)
        assert np.array_equal(np.asarray(way.carry(staged).keys_KLnCH), np.asarray(staged.keys_KLnCH))
    assert counter.late == 0


@pytest.mark.parametrize("tp", [1, 2, 8])
def test_on_the_host_every_head_stands_once_and_in_order(tp):
    staged = drawn(lane(tp, 4), 4)
    shards = host_shards(staged, 2)
    assert [shard.first_head for shard in shards] == list(range(0, 4, 4 // min(tp, 4)))
    keys, values = to_host(staged, 2)
    assert np.array_equal(keys, np.asarray(staged.keys_KLnCH)[:, :, :2])
    assert np.array_equal(values, np.asarray(staged.values_KLnCH)[:, :, :2])


def test_on_a_cpu_the_host_reads_the_memory_of_the_device():
    staged = drawn(lane(2, 4), 4)
    shard = host_shards(staged, 3)[1]
    assert shard.keys_KLnCH.ctypes.data == staged.keys_KLnCH.addressable_data(1).unsafe_buffer_pointer()
    assert not shard.keys_KLnCH.flags.writeable


def test_checksums_are_those_of_the_content_on_any_mesh():
    found = []
    for tp in (1, 2, 8):
        shards = host_shards(drawn(lane(tp, 4), 4), 3)
        found.append(np.concatenate([checksums(shard.keys_KLnCH, shard.values_KLnCH) for shard in shards]))
    assert all(np.array_equal(found[0], other) for other in found[1:]) and found[0].shape == (4,)


@pytest.mark.parametrize("tps, first", [((2, 4), 1), ((4, 4), 2)], ids=str)
def test_on_a_cpu_what_is_there_is_handed_on_without_a_copy(tps, first):
    source, target = lane(tps[0], 4), lane(tps[1], 4, 4)
    staged = jax.block_until_ready(drawn(source, 4))
    moved = carrier(source, target, 4).carry(staged)
    heads = [array.addressable_data(shard) for array, shard in ((staged[1], first), (moved[1], 2))]
    assert heads[0].unsafe_buffer_pointer() == heads[1].unsafe_buffer_pointer()
    wanted = np.array(staged.values_KLnCH)
    del staged, heads
    assert np.array_equal(np.asarray(moved.values_KLnCH), wanted), "the memory lives as long as who reads it"


def test_a_move_whose_making_failed_is_told_before_it_is_used():
    class Broken:
        def is_ready(self):
            return True

        def block_until_ready(self):
            raise jax.errors.JaxRuntimeError("INTERNAL: injected")

    with pytest.raises(DeviceError, match=r"^device: a move of blocks failed: JaxRuntimeError$"):
        arrived((Broken(), Broken()))


def test_the_axes_of_the_meshes_above_are_those_of_lanes():
    assert lane_axes(8, HEADS_OF_MODEL, 2) == (2, 4) and lane(8, 2).shape == {"kv": 2, "rep": 4}
