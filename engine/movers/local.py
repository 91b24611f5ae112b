"""Moves staged blocks from one lane's devices to another's in the same process, and to the host.

    staged on mesh A --cut each shard in units--> unit --to its device--> unit --join--> staged on mesh B
                       (A splits less)                                    (B splits less)

A unit is the most heads that every shard of both lanes holds whole. Each device's part goes straight to the devices
that want it, and nothing waits, whatever the two meshes. Where A splits the heads as B does, only how often each is
repeated differs, and nothing is cut or joined. `to_host` waits for the device, so it runs on no lane's thread.

The devices of a CPU share its memory: what is there already when it is carried is cut and handed on without a copy.

Cost: one copy to the other device, one more where shards are cut or joined; on a CPU, of what is there, none but
that of a join. About 10 us of the caller an array and target device.
"""

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from engine.errors import DeviceError
from engine.movers.parts import Heads

HEADS = PartitionSpec("kv", None, None, None, None)
Arrays = TypeVar("Arrays", bound=tuple)  # keys_KLnCH, values_KLnCH
Overlap = tuple[int, int, int, int]  # source shard, target shard, first head, stop head
Part = Callable[[int, int], jax.Array | np.ndarray]  # (source shard, which of its units) -> the unit


class Carrier:
    """The way from one lane's mesh to another's.

    overlaps  as sharding/overlap.py plans them
    shared    whether the devices share their memory; those of a CPU do. What is carried then may be the very memory
              that it came from, and to verify it again tells nothing
    """

    def __init__(self, source: Mesh, target: Mesh, overlaps: Sequence[Overlap], shared: bool | None = None):
        kv_heads = max(stop for _, _, _, stop in overlaps)
        wide, narrow = kv_heads // source.shape["kv"], kv_heads // target.shape["kv"]
        self._unit = math.gcd(wide, narrow)
        self._cuts, self._joins = wide // self._unit, narrow // self._unit
        self._cut, self._join = _cut_program(source, self._cuts), _join_program(target)
        self._kv, self._sharding = target.shape["kv"], NamedSharding(target, HEADS)
        self._routes = _routes(overlaps, self._unit, self._cuts, self._joins, target.shape["rep"])
        platforms = {device.platform for mesh in (source, target) for device in mesh.devices.flat}
        self.shared = platforms == {"cpu"} if shared is None else shared

    def carry(self, staged: Arrays) -> Arrays:
        """`staged` on the target mesh; returns at once.

        An error in the making of `staged` comes with what is returned (`arrived`), or is raised as DeviceError if
        it is known already.
        """
        if self.shared and arrived(staged):
            return self._deliver(staged, [_views(array, self._unit) for array in staged])
        return self._send(staged)

    def warm_up(self, staged: Sequence[Arrays]) -> None:
        """Compile what moving arrays of these shapes takes, once each, and wait."""
        for each in staged:
            jax.block_until_ready((self._send(each), self.carry(each)))

    def _send(self, staged: Arrays) -> Arrays:
        units = self._cut(*staged) if self._cuts > 1 else [(array,) for array in staged]
        return self._deliver(staged, [_shards(each) for each in units])

    def _deliver(self, staged: Arrays, parts: Sequence[Part]) -> Arrays:
        moved = []
        for array, part in zip(staged, parts, strict=True):
            moved.append([self._place(array.shape, part, joined) for joined in range(self._joins)])
        return type(staged)(*(self._join(*moved) if self._joins > 1 else (units[0] for units in moved)))

    def _place(self, shape: tuple[int, ...], part: Part, joined: int) -> jax.Array:
        """The units that are number `joined` of each target shard; replicas ask in turn, each of its own sender.

        Where every shard is a replica of one and the same head JAX asks once, and one sender serves all.
        """
        senders = {kv: iter(routes) for kv, routes in self._routes[joined].items()}

        def wanted(index: tuple[slice, ...]) -> jax.Array | np.ndarray:
            return part(*next(senders[(index[0].start or 0) // self._unit]))

        shape = (self._kv * self._unit, *shape[1:])
        return jax.make_array_from_callback(shape, self._sharding, wanted)


def arrived(staged: Sequence[jax.Array]) -> bool:
    """Whether the arrays are there; never waits. Raises DeviceError when what makes them failed."""
    if not all(array.is_ready() for array in staged):
        return False
    try:
        jax.block_until_ready(staged)
    except jax.errors.JaxRuntimeError as error:
        raise DeviceError(f"device: a move of blocks failed: {type(error).__name__}") from error
    return True


def host_shards(staged: Sequence[jax.Array], count: int) -> tuple[Heads, ...]:
    """The first `count` blocks, shard by shard in the order of heads, each head once; waits for the device.

    Of a lane that spans processes, the shards of this one.

    On a CPU the arrays are the device's own memory, read-only; so nothing is copied, and they keep it alive.
    """
    for array in staged:
        array.copy_to_host_async()
    found: dict[int, Heads] = {}
    for keys, values in zip(*(array.addressable_shards for array in staged), strict=True):
        first = keys.index[0].start or 0
        if first not in found:
            found[first] = Heads(*(np.asarray(shard.data)[:, :, :count] for shard in (keys, values)), first)
    return tuple(found[first] for first in sorted(found))


def to_host(staged: Sequence[jax.Array], count: int) -> tuple[np.ndarray, np.ndarray]:
    """(keys, values) [K, L, count, C, H] of the first `count` blocks; copied where there is more than one shard."""
    shards = host_shards(staged, count)
    if len(shards) == 1:
        return shards[0].keys_KLnCH, shards[0].values_KLnCH
    return (
        np.concatenate([shard.keys_KLnCH for shard in shards]),
        np.concatenate([shard.values_KLnCH for shard in shards]),
    )


def _shards(units: Sequence[jax.Array]) -> Part:
    return lambda shard, unit: units[unit].addressable_data(shard)


def _views(array: jax.Array, heads: int) -> Part:
    """Units of `heads` heads as they stand in the memory of a CPU."""
    return lambda shard, unit: np.asarray(array.addressable_data(shard))[unit * heads : (unit + 1) * heads]


def _routes(
    overlaps: Sequence[Overlap], unit: int, cuts: int, joins: int, rep: int
) -> list[dict[int, list[tuple[int, int]]]]:
    """By joined unit and kv index of the target: (source shard, which of its units), one a replica."""
    routes: list[dict[int, list[tuple[int, int]]]] = [{} for _ in range(joins)]
    for source, target, first, stop in overlaps:
        for head in range(first, stop, unit):
            routes[head // unit % joins].setdefault(target // rep, []).append((source, head // unit % cuts))
    return routes


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
