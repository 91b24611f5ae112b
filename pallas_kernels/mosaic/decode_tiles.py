"""What a program of the decode kernel does with one tile of 64 positions: copy it in, multiply, clean, multiply.

Heads are the narrow side of both products, so that a group of 1 to 8 query heads costs the same and nothing is
padded to the 64 rows that a tensor core's first operand has:

    scores_sg = k_sH . q_Hg        positions are the 64 rows
    total_Hg += v_Hs . weights_sg  the head width is, in parts of 64

    plain    keys and values are multiplied out of shared memory. Where a tile has positions that nobody sees,
             whose values may be NaN, those are zeroed there first.
    scaled   8-bit keys and values pass through registers, where they become bfloat16, whose range holds a weight
             times any scale; a position's scales are folded into its scores and its weights, and what nobody sees
             is masked after.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic.memory import ROWS, box_bytes, load, parts_of, swizzled
from pallas_kernels.work import TILE

L = plgpu.Layout


class Sizes(NamedTuple):
    """What a kernel is compiled for."""

    K: int
    G: int
    H: int
    C: int
    M: int
    stages: int
    dtype: jnp.dtype  # of the products' operands
    pool_dtype: jnp.dtype
    scale: float
    window: int | None
    soft_cap: float | None

    @property
    def g(self) -> int:
        """Query heads of a kv head, padded to what a tensor core takes."""
        return -(-self.G // 8) * 8

    @property
    def apart(self) -> int:
        """Query heads from a kv head's first to the next one's: a copy begins where a box of 8 does, or fits it."""
        return self.g if self.G % 8 and 8 % self.G else self.G

    @property
    def box(self) -> int:
        """Positions that one copy brings."""
        return min(self.C, TILE)

    @property
    def scaled(self) -> bool:
        return self.pool_dtype != self.dtype


class Refs(NamedTuple):
    """Global memory, then shared memory, then barriers."""

    q_BNH: jax.Array
    k: jax.Array  # [P, K, C, H]
    v: jax.Array  # the same, or [P, K, H, C] of 8 bits
    scales: tuple[jax.Array, ...]  # of keys and of values [P, K, C]; none of plain pools
    table_BM: jax.Array
    lengths_B: jax.Array
    base: jax.Array
    row_I: jax.Array
    first_I: jax.Array
    count_I: jax.Array
    bound_X: jax.Array
    totals_IKHg: jax.Array
    stats_IKSg: jax.Array
    q_tiles: jax.Array  # of this item and the next
    k_tiles: jax.Array
    v_tiles: jax.Array
    scale_tiles: tuple[jax.Array, ...]
    weights_gs: jax.Array
    q_here: jax.Array
    q_free: jax.Array
    k_here: jax.Array
    k_free: jax.Array
    v_here: jax.Array
    v_free: jax.Array


class Seen(NamedTuple):
    """Which positions of a tile the row sees; scalars."""

    first: jax.Array  # position of the tile's first place
    begin: jax.Array
    end: jax.Array

    @property
    def partly(self) -> jax.Array:
        return (self.first < self.begin) | (self.first + TILE > self.end)

    def mask(self, shape: tuple[int, int], axis: int) -> jax.Array:
        """Of an array in a tensor core's layout whose `axis` holds the tile's positions."""
        position = self.first + plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=L.WGMMA)
        return (position >= self.begin) & (position < self.end)


def shared_memory(sizes: Sizes) -> dict[str, object]:
    """What a program holds, by the names of `Refs`."""
    g, H, stages = sizes.g, sizes.H, sizes.stages
    plain = swizzled(box_bytes(2 * H), 2)
    tiles, v_shape, scale_tiles = plain, (stages, TILE, H), ()
    if sizes.scaled:
        tiles, v_shape = swizzled(TILE, 1), (stages, H, TILE)
        scale_tiles = (plgpu.SMEM((stages, TILE), jnp.float32),)
    copies = TILE // sizes.box + len(scale_tiles)
    return {
        "q_tiles": plgpu.SMEM((2, g, H), sizes.dtype, transforms=plain),
        "k_tiles": plgpu.SMEM((stages, TILE, H), sizes.pool_dtype, transforms=tiles),
        "v_tiles": plgpu.SMEM(v_shape, sizes.pool_dtype, transforms=tiles),
        "scale_tiles": 2 * scale_tiles,
        "weights_gs": plgpu.SMEM((g, TILE), sizes.dtype, transforms=plain),
        "q_here": plgpu.Barrier(num_barriers=2),
        "q_free": plgpu.Barrier(num_barriers=2),
        "k_here": plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
        "k_free": plgpu.Barrier(num_barriers=stages),
        "v_here": plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
        "v_free": plgpu.Barrier(num_barriers=stages),
    }


def copy_keys(refs: Refs, sizes: Sizes, head: jax.Array, blocks: tuple[jax.Array, ...], offset, slot) -> None:
    """Begin to copy a tile of keys from `offset` in its block, or from all its blocks."""
    here, part = refs.k_here.at[slot], pl.ds(offset, sizes.box)
    for j, block in enumerate(blocks):
        place = pl.ds(j * sizes.box, sizes.box)
        plgpu.copy_gmem_to_smem(refs.k.at[block, head, part], refs.k_tiles.at[slot, place], here)
    if sizes.scaled:
        plgpu.copy_gmem_to_smem(refs.scales[0].at[blocks[0], head, part], refs.scale_tiles[0].at[slot], here)


def copy_values(refs: Refs, sizes: Sizes, head: jax.Array, blocks: tuple[jax.Array, ...], offset, slot) -> None:
    """`copy_keys` of values."""
    here, part = refs.v_here.at[slot], pl.ds(offset, sizes.box)
    if sizes.scaled:
        plgpu.copy_gmem_to_smem(refs.v.at[blocks[0], head, :, part], refs.v_tiles.at[slot], here)
        plgpu.copy_gmem_to_smem(refs.scales[1].at[blocks[0], head, part], refs.scale_tiles[1].at[slot], here)
        return
    for j, block in enumerate(blocks):
        place = pl.ds(j * sizes.box, sizes.box)
        plgpu.copy_gmem_to_smem(refs.v.at[block, head, part], refs.v_tiles.at[slot, place], here)


def scores(refs: Refs, sizes: Sizes, slot: jax.Array, q_slot: jax.Array) -> jax.Array:
    """[64, g] in float32, times the keys' scales. Plain keys are given back here, scaled ones with their values."""
    plgpu.barrier_wait(refs.k_here.at[slot])

    def plain(sum_sg):
        plgpu.wgmma(sum_sg, refs.k_tiles.at[slot], refs.q_tiles.at[q_slot].transpose((1, 0)))
        return sum_sg[...]

    def scaled(sum_sg):
        for start in parts_of(sizes.H):
            part = pl.ds(start, ROWS)
            k_sh = widened(load(refs.k_tiles.at[slot, :, part], L.WGMMA_UPCAST_2X), sizes.dtype)
            plgpu.wgmma(sum_sg, k_sh, refs.q_tiles.at[q_slot, :, part].transpose((1, 0)))
        return sum_sg[...]

    scores_sg = pl.run_scoped(scaled if sizes.scaled else plain, plgpu.ACC((TILE, sizes.g), jnp.float32))
    if not sizes.scaled:
        plgpu.barrier_arrive(refs.k_free.at[slot])
        return scores_sg
    scale_s = load(refs.scale_tiles[0].at[slot], L.WGMMA.reduce(1))
    return scores_sg * lax.broadcast_in_dim(scale_s, scores_sg.shape, [0])


def widened(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """8-bit numbers, loaded for it, as a tensor core's first operand of `dtype`."""
    x = plgpu.layout_cast(x, L.WGMMA)
    return (x if x.dtype == jnp.int8 else x.astype(jnp.float32)).astype(dtype)


def add_values(refs: Refs, sizes: Sizes, slot: jax.Array, weights_sg: jax.Array, seen: Seen) -> list[jax.Array]:
    """The weighted values of a tile, float32 [64, g] for each part of the head width."""
    if sizes.scaled:
        return scaled_values(refs, sizes, slot, weights_sg, seen)
    weights_sg_ref = refs.weights_gs.transpose((1, 0))
    weights_sg_ref[...] = plgpu.layout_cast(weights_sg.astype(sizes.dtype), L.WGMMA_TRANSPOSED)
    plgpu.commit_smem()
    plgpu.barrier_wait(refs.v_here.at[slot])
    pl.when(seen.partly)(lambda: clean(refs, sizes, slot, seen))

    def product(*sums):
        for start, sum_hg in zip(parts_of(sizes.H), sums, strict=True):
            v_hs = refs.v_tiles.at[slot, :, pl.ds(start, ROWS)].transpose((1, 0))
            plgpu.wgmma(sum_hg, v_hs, weights_sg_ref)
        return [sum_hg[...] for sum_hg in sums]

    sums = [plgpu.ACC((ROWS, sizes.g), jnp.float32) for _ in parts_of(sizes.H)]
    added = pl.run_scoped(product, *sums)
    plgpu.barrier_arrive(refs.v_free.at[slot])
    return added


def clean(refs: Refs, sizes: Sizes, slot: jax.Array, seen: Seen) -> None:
    """Zero the values that nobody sees: there may be NaN, and 0 * NaN is NaN."""
    width = box_bytes(2 * sizes.H) // 2
    for h in range(0, sizes.H, width):
        part = refs.v_tiles.at[slot, :, pl.ds(h, width)]
        v_sh = load(part, L.WGMMA)
        part[...] = jnp.where(seen.mask(v_sh.shape, 0), v_sh, jnp.zeros_like(v_sh))
    plgpu.commit_smem()


def scaled_values(refs: Refs, sizes: Sizes, slot, weights_sg, seen: Seen) -> list[jax.Array]:
    """`add_values` of 8-bit values: in registers before the commit, so that their place is free after it.

    One part is multiplied after the other, to hold the wide numbers of one at a time.
    """
    plgpu.barrier_wait(refs.v_here.at[slot])
    scale_s = load(refs.scale_tiles[1].at[slot], L.WGMMA.reduce(1))
    weights_sg = weights_sg * lax.broadcast_in_dim(scale_s, weights_sg.shape, [0])
    weights_sg = jnp.where(seen.mask(weights_sg.shape, 0), weights_sg, 0.0)
    weights_sg_ref = refs.weights_gs.transpose((1, 0))
    weights_sg_ref[...] = plgpu.layout_cast(weights_sg.astype(sizes.dtype), L.WGMMA_TRANSPOSED)
    parts = [load(refs.v_tiles.at[slot, pl.ds(start, ROWS)], L.WGMMA_UPCAST_2X) for start in parts_of(sizes.H)]
    plgpu.commit_smem()
    plgpu.barrier_arrive(refs.k_free.at[slot])
    plgpu.barrier_arrive(refs.v_free.at[slot])
    added = []
    for part in parts:

        def product(sum_hg, part=part):
            v_hs = widened(part, sizes.dtype)
            if sizes.pool_dtype != jnp.int8:
                v_hs = jnp.where(seen.mask(v_hs.shape, 1), v_hs, jnp.zeros_like(v_hs))
            plgpu.wgmma(sum_hg, v_hs, weights_sg_ref)
            return sum_hg[...]

        added.append(pl.run_scoped(product, plgpu.ACC((ROWS, sizes.g), jnp.float32)))
    return added
