"""Moves staged blocks from one lane's devices to another's in the same process, and to the host.

    staged on mesh A --cut each shard in units--> unit --device_put--> unit --join--> staged on mesh B
                       (A splits less)                                  (B splits less)

A unit is the most heads that every shard of both lanes holds whole. Each device's part goes straight to the devices
that want it, and nothing waits, whatever the two meshes. Where A splits the heads as B does, only how often each is
repeated differs, and nothing is cut or joined. `to_host` waits for the device, so it runs on no lane's thread.

Cost: one copy to the other device, one more where shards are cut or joined; about 30 us of the caller an array and
target device.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from engine.errors import DeviceError

HEADS = PartitionSpec("kv", None, None, None, None)
Arrays = TypeVar("Arrays", bound=tuple)  # keys_KLnCH, values_KLnCH
Overlap = tuple[int, int, int, int]  # source shard, target shard, first head, stop head


class Carrier:
    """The way from one lane's mesh to another's; `overlaps` as sharding/overlap.py plans them."""

    def __init__(self, source: Mesh, target: Mesh, overlaps: Sequence[Overlap]):
        kv_heads = max(stop for _, _, _, stop in overlaps)
        wide, narrow = kv_heads // source.shape["kv"], kv_heads // target.shape["kv"]
        unit = math.gcd(wide, narrow)
        self._source, self._target = source, target
        self._cuts, self._joins = wide // unit, narrow // unit
        self._cut, self._join = _cut_program(source, self._cuts), _join_program(target)
        self._sharding = NamedSharding(target, HEADS)
        self._devices = target.devices.reshape(-1).tolist()
        self._routes = [  # (which cut of the shard, of which source shard), by joined unit, then target shard
            [route for route in _routes(overlaps, unit, self._cuts, self._joins) if route[0] == joined]
            for joined in range(self._joins)
        ]

    def carry(self, staged: Arrays) -> Arrays:
        """`staged` on the target mesh; returns at once. An error of its making comes with it (`arrived`)."""
        units = self._cut(*staged) if self._cuts > 1 else tuple((array,) for array in staged)
        moved = [[self._move(parts, joined) for joined in range(self._joins)] for parts in units]
        arrays = self._join(*moved) if self._joins > 1 else (parts[0] for parts in moved)
        return type(staged)(*arrays)

    def warm_up(self, staged: Sequence[Arrays]) -> None:
        """Compile what moving arrays of these shapes takes, once each, and wait."""
        for each in staged:
            jax.block_until_ready(self.carry(each))

    def _move(self, parts: Sequence[jax.Array], joined: int) -> jax.Array:
        routes = self._routes[joined]
        pieces = [parts[cut].addressable_data(shard) for _, cut, shard, _ in routes]
        pieces = jax.device_put(pieces, self._devices)
        shape = (pieces[0].shape[0] * self._target.shape["kv"], *pieces[0].shape[1:])
        return jax.make_array_from_single_device_arrays(shape, self._sharding, pieces)


class HostShard(NamedTuple):
    """The heads of one shard on the host, from first_head on."""

    first_head: int
    keys_KLnCH: np.ndarray
    values_KLnCH: np.ndarray


def arrived(staged: Sequence[jax.Array]) -> bool:
    """Whether the arrays are there; never waits. Raises DeviceError when what makes them failed."""
    if not all(array.is_ready() for array in staged):
        return False
    try:
        jax.block_until_ready(staged)
    except jax.errors.JaxRuntimeError as error:
        raise DeviceError(f"device: a move of blocks failed: {type(error).__name__}") from error
    return True


def host_shards(staged: Sequence[jax.Array], count: int) -> tuple[HostShard, ...]:
    """The first `count` blocks, shard by shard in the order of heads, each head once; waits for the device.

    On a CPU the arrays are the device's own memory, read-only; so nothing is copied, and they keep it alive.
    """
    for array in staged:
        array.copy_to_host_async()
    shards, first = [], 0
    mesh = staged[0].sharding.mesh
    for number in range(0, mesh.size, mesh.shape["rep"]):
        keys, values = (np.asarray(array.addressable_data(number))[:, :, :count] for array in staged)
        shards.append(HostShard(first, keys, values))
        first += len(keys)
    return tuple(shards)


def to_host(staged: Sequence[jax.Array], count: int) -> tuple[np.ndarray, np.ndarray]:
    """(keys, values) [K, L, count, C, H] of the first `count` blocks; copied where there is more than one shard."""
    shards = host_shards(staged, count)
    if len(shards) == 1:
        return shards[0].keys_KLnCH, shards[0].values_KLnCH
    return (
        np.concatenate([shard.keys_KLnCH for shard in shards]),
        np.concatenate([shard.values_KLnCH for shard in shards]),
    )


def _routes(overlaps: Sequence[Overlap], unit: int, cuts: int, joins: int) -> list[tuple[int, int, int, int]]:
    """(joined unit of the target shard, cut of the source shard, source shard, target shard), by target shard."""
    routes = []
    for source, target, first, stop in overlaps:
        for head in range(first, stop, unit):
            routes.append((head // unit % joins, head // unit % cuts, source, target))
    return sorted(routes, key=lambda route: route[3])


def _cut_program(mesh: Mesh, parts: int) -> Callable:
    """A jitted (keys, values) -> each as `parts` arrays, which hold one unit of every shard."""

    def local(keys_KLnCH, values_KLnCH):
        return tuple(tuple(jnp.split(array, parts)) for array in (keys_KLnCH, values_KLnCH))

    mapped = jax.shard_map(local, mesh=mesh, in_specs=(HEADS, HEADS), out_specs=HEADS, check_vma=False)
    return jax.jit(mapped)


def _join_program(mesh: Mesh) -> Callable:
    """A jitted (parts of keys, parts of values) -> (keys, values)."""

    def local(keys, values):
        return jnp.concatenate(keys), jnp.concatenate(values)

    mapped = jax.shard_map(local, mesh=mesh, in_specs=(HEADS, HEADS), out_specs=HEADS, check_vma=False)
    return jax.jit(mapped)
