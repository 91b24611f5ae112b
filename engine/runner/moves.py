"""Blocks out of a lane's pools and into them, in order with its steps: what a move does on the device.

    pools [L*P, K, C, H] --gather(blocks)--> Staged [K, L, n, C, H] --(a mover)--> Staged --scatter(blocks)--> pools

Heads come first in Staged, so that the heads of one shard, or any part of them, are one contiguous piece. n is one
of a few sizes; a shorter list is padded with block 0, the sink: read for nothing, and written with anything. Each
size is two programs. Both dispatch and return: a gather reads what the steps before it wrote, and the steps behind
a scatter see its blocks. (XLA on a CPU runs what waits for nothing in the thread that dispatches it.)

An 8-bit pool is staged as bytes, the scale of a position behind its numbers and values turned as keys are, so that
what carries, cuts and sums Staged knows nothing of it: [K, L, n, C, H + 4] in uint8.

Cost on a CPU: about a copy of what moves each, and no temporaries that grow with the pools. A piece is small there:
it stays in the caches from gather to scatter, and in memory that the allocator keeps; large arrays are handed back
to the system each time, and every page of them faults anew. On a GPU (compiled for an H200, not run) a gather is
one kernel and a scatter one a pool, with no temporaries.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from engine.runner.buckets import ladder
from engine.runner.state import POOL
from pallas_kernels.dispatch import platform_of
from pallas_kernels.pools import SCALE_BYTES, Pool, Scaled

MOST_SIZES = 4  # two programs each
MOST_BLOCKS = 64
CPU_PIECE_BYTES, PIECE_BYTES = 4 << 20, 32 << 20  # of an array on one device
HEADS = PartitionSpec("kv", None, None, None, None)


class Staged(NamedTuple):
    """Keys and values of n blocks on the way; jax arrays split over K on axis kv, or numpy arrays on the host."""

    keys_KLnCH: jax.Array | np.ndarray
    values_KLnCH: jax.Array | np.ndarray


def move_sizes(block_bytes: int, usable_blocks: int, platform: str) -> tuple[int, ...]:
    """The numbers of blocks that lanes which move blocks among them compile programs for, smallest first.

    block_bytes    keys of one block on one device, in the lane where that is most
    usable_blocks  of the smallest pool
    """
    piece_bytes = CPU_PIECE_BYTES if platform == "cpu" else PIECE_BYTES
    return ladder(1, max(min(MOST_BLOCKS, piece_bytes // block_bytes, usable_blocks), 1), MOST_SIZES)


def cut(blocks: Sequence[int], sizes: Sequence[int]) -> Iterator[Sequence[int]]:
    """`blocks` in pieces that `sizes` hold: padded where that at most doubles a piece, else full."""
    start = 0
    while start < len(blocks):
        left = len(blocks) - start
        padded = [size for size in sizes if left <= size <= 2 * left]
        take = left if padded else max(size for size in sizes if size <= left)
        yield blocks[start : start + take]
        start += take


def place(staged: Staged, mesh: Mesh, size: int) -> Staged:
    """Host arrays on the devices of `mesh`, padded to `size` blocks; every device gets its own heads, no others.

    The arrays are given away: on a CPU the devices may read the same memory, whenever they come to it. They are
    made read-only here. They hold the heads of this process's devices, where the mesh spans several.
    """
    sharding, mine = NamedSharding(mesh, HEADS), mesh.local_devices
    places = [(k, device) for k, devices in enumerate(mesh.devices) for device in devices if device in mine]
    local = sorted({k for k, _ in places})

    def placed(array_KLnCH: np.ndarray) -> jax.Array:
        array_KLnCH.setflags(write=False)
        parts = [_padded(part, size) for part in np.split(array_KLnCH, len(local))]
        shards = [jax.device_put(parts[k - local[0]], device) for k, device in places]
        whole = (mesh.shape["kv"] * len(parts[0]), *parts[0].shape[1:])
        return jax.make_array_from_single_device_arrays(whole, sharding, shards)

    return Staged(*map(placed, staged))


class MovePrograms:
    """The compiled gathers and scatters of one lane's pools."""

    def __init__(self, mesh: Mesh, num_layers: int, num_blocks: int, sizes: tuple[int, ...]):
        self.mesh, self.num_layers, self.num_blocks, self.sizes = mesh, num_layers, num_blocks, sizes
        self.gathers: dict[int, Callable] = {}
        self.scatters: dict[int, Callable] = {}

    def compile(self, size: int, pools: tuple[Pool, Pool]) -> tuple[Pool, Pool]:
        """Compile both programs of `size` and run them once; the pools afterwards, equal but for their sinks."""
        sinks = np.zeros(size, np.int32)
        gather, scatter = gather_program(self.mesh, self.num_layers), scatter_program(self.mesh, self.num_layers)
        self.gathers[size] = gather.lower(*pools, sinks).compile()
        staged = self.gathers[size](*pools, sinks)
        self.scatters[size] = scatter.lower(*pools, *staged, sinks).compile()
        return self.scatters[size](*pools, *staged, sinks)

    def gather(self, pools: tuple[Pool, Pool], blocks: Sequence[int]) -> Staged:
        """The content of `blocks`, first blocks of the smallest size that holds them."""
        size = self._size(len(blocks))
        return Staged(*self.gathers[size](*pools, self._numbers(blocks, size)))

    def scatter(self, pools: tuple[Pool, Pool], blocks: Sequence[int], staged: Staged) -> tuple[Pool, Pool]:
        """The pools with `staged` in `blocks`; the old ones are donated."""
        if isinstance(staged.keys_KLnCH, np.ndarray):
            staged = place(staged, self.mesh, self._size(len(blocks)))
        size = staged.keys_KLnCH.shape[2]
        return self.scatters[size](*pools, *staged, self._numbers(blocks, size))

    def _size(self, count: int) -> int:
        return next(size for size in self.sizes if size >= count)

    def _numbers(self, blocks: Sequence[int], size: int) -> np.ndarray:
        """int32 [size]. XLA clamps a gather and drops a scatter out of range: neither may come to that."""
        numbers = np.zeros(size, np.int32)
        numbers[: len(blocks)] = blocks
        assert all(0 < block < self.num_blocks for block in blocks), f"blocks of a move: got {list(blocks)!r:.64}"
        return numbers


def gather_program(mesh: Mesh, num_layers: int) -> Callable:
    """A jitted (k, v, blocks_n) -> (keys_KLnCH, values_KLnCH)."""

    def local(k: Pool, v: Pool, blocks_n):
        arrays = (jax.tree.map(lambda array: _gather_local(array, blocks_n, num_layers), pool) for pool in (k, v))
        return tuple(_joined(array, turned) for array, turned in zip(arrays, (False, True), strict=True))

    specs = (POOL, POOL, PartitionSpec())
    return jax.jit(jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=(HEADS, HEADS), check_vma=False))


def scatter_program(mesh: Mesh, num_layers: int) -> Callable:
    """A jitted (k, v, keys_KLnCH, values_KLnCH, blocks_n) -> (k, v); the pools are donated."""
    write = _scatter_looping_local if platform_of(mesh.devices.flat[0]) == "cpu" else _scatter_local

    def local(k: Pool, v: Pool, keys_KLnCH, values_KLnCH, blocks_n):
        new = _parted(k, keys_KLnCH, False), _parted(v, values_KLnCH, True)
        return tuple(
            jax.tree.map(lambda *two: write(*two, blocks_n), *each) for each in zip((k, v), new, strict=True)
        )

    specs = (POOL, POOL, HEADS, HEADS, PartitionSpec())
    mapped = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=(POOL, POOL), check_vma=False)
    return jax.jit(mapped, donate_argnums=(0, 1))


def staged_tile(width: int, held: np.dtype) -> tuple[int, np.dtype]:
    """Width and dtype of a position's keys of one head as they are staged, where pools hold them in `held`."""
    return (width + SCALE_BYTES, np.dtype(np.uint8)) if held.itemsize == 1 else (width, held)


def _joined(pool: Pool, turned: bool) -> jax.Array:
    """The arrays of gathered blocks as one; `turned` where positions are last."""
    if not isinstance(pool, Scaled):
        return pool
    numbers = lax.bitcast_convert_type(pool.numbers, jnp.uint8)
    numbers = numbers.swapaxes(-1, -2) if turned else numbers
    return jnp.concatenate([numbers, lax.bitcast_convert_type(pool.scales_PKC, jnp.uint8)], axis=-1)


def _parted(pool: Pool, staged_KLnCH: jax.Array, turned: bool) -> Pool:
    """The inverse of `_joined`, for a pool like `pool`."""
    if not isinstance(pool, Scaled):
        return staged_KLnCH
    numbers, scales = jnp.split(staged_KLnCH, [staged_KLnCH.shape[-1] - SCALE_BYTES], axis=-1)
    numbers = numbers.swapaxes(-1, -2) if turned else numbers
    return Scaled(
        lax.bitcast_convert_type(numbers, pool.numbers.dtype), lax.bitcast_convert_type(scales, jnp.float32)
    )


def _places(blocks_n: jax.Array, pool_PKCH: jax.Array, num_layers: int) -> jax.Array:
    """Where each tile of `blocks_n` stands among all tiles of the pool, in the order of Staged: [K * L * n]."""
    lines, heads = pool_PKCH.shape[:2]
    line_Ln = lines // num_layers * jnp.arange(num_layers)[:, None] + blocks_n
    return (heads * line_Ln + jnp.arange(heads)[:, None, None]).reshape(-1)


def _gather_local(pool_PKCH: jax.Array, blocks_n: jax.Array, num_layers: int) -> jax.Array:
    heads, *tile = pool_PKCH.shape[1:]
    tiles = pool_PKCH.reshape(-1, *tile).at[_places(blocks_n, pool_PKCH, num_layers)].get(mode="promise_in_bounds")
    return tiles.reshape(heads, num_layers, -1, *tile)


def _scatter_local(pool_PKCH: jax.Array, staged_KLnCH: jax.Array, blocks_n: jax.Array) -> jax.Array:
    tile = pool_PKCH.shape[2:]
    places = _places(blocks_n, pool_PKCH, staged_KLnCH.shape[1])
    pool = pool_PKCH.reshape(-1, *tile).at[places].set(staged_KLnCH.reshape(-1, *tile), mode="promise_in_bounds")
    return pool.reshape(pool_PKCH.shape)


def _scatter_looping_local(pool_PKCH: jax.Array, staged_KLnCH: jax.Array, blocks_n: jax.Array) -> jax.Array:
    """The same, a block of a layer at a time: XLA's scatter on a CPU first copies what it writes."""
    heads, layers, count, *tile = staged_KLnCH.shape
    num_blocks = pool_PKCH.shape[0] // layers
    staged_KnCH = staged_KLnCH.reshape(heads, -1, *tile)

    def write(i, pool_PKCH):
        block_KCH = lax.dynamic_slice_in_dim(staged_KnCH, i, 1, axis=1).reshape(1, heads, *tile)
        line = i // count * num_blocks + blocks_n[i % count]
        return lax.dynamic_update_slice_in_dim(pool_PKCH, block_KCH, line, axis=0)

    return lax.fori_loop(0, layers * count, write, pool_PKCH)


def _padded(array_KLnCH: np.ndarray, size: int) -> np.ndarray:
    """With `size` blocks; what fills the place of the others is arbitrary."""
    heads, layers, count, *tile = array_KLnCH.shape
    if count == size:
        return array_KLnCH
    whole = np.empty((heads, layers, size, *tile), array_KLnCH.dtype)
    whole[:, :, :count] = array_KLnCH
    return whole
