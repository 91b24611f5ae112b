"""What a block of threads of `chunks` does next, and the producer that fetches it.

An item is one query tile of one kv head. Blocks take items from the work list in turns, forwards and backwards:

    list      0 1 2 | 5 4 3 | 6 7 8      3 blocks, so block 0 has items 0, 5 and 6

The producer fills a ring with keys and values, tile after tile and item after item. It looks up a tile's blocks
before it waits for a place, and fetches an item's queries after its first keys, when the item before is done.

Cost: of a block with positions s, one copy a tile and pool; a smaller one more. Positions that nobody sees are
copied from block 0, which may hold anything: the consumer clears what it must not multiply.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic.memory import ROWS, box_bytes, swizzled
from pallas_kernels.mosaic.tiles import BOX, Tiles


class Sizes(NamedTuple):
    """What a kernel is compiled for."""

    tile: int  # positions
    stages: int
    heads: int
    ordered: bool
    K: int
    G: int
    H: int
    C: int
    M: int
    parts: int  # tiles that share a kv head and tokens, because its query heads are more than a tile's
    blocks: int  # of threads
    scale: float
    window: int | None
    soft_cap: float | None
    sinks: bool

    @property
    def own_heads(self) -> int:
        """Query heads of one consumer."""
        return max(1, self.heads // 2)

    @property
    def own_tokens(self) -> int:
        """Tokens of one consumer."""
        return ROWS // self.own_heads

    @property
    def next_token(self) -> int:
        """How many tokens after consumer 0's those of consumer 1 begin."""
        return self.own_tokens if self.heads == 1 else 0

    @property
    def next_head(self) -> int:
        """The same for query heads."""
        return 0 if self.heads == 1 else self.own_heads


class Refs(NamedTuple):
    """Global memory, then shared memory, then barriers."""

    q_TNH: jax.Array
    k_PKCH: jax.Array
    v_PKCH: jax.Array
    table_BM: jax.Array
    tiles: jax.Array  # [W, 9], a line as in `Tiles`
    total: jax.Array
    base: jax.Array
    sinks: jax.Array  # [K * parts, 2, 64]
    o_TNH: jax.Array
    lse: jax.Array  # [W, K * parts, 2, 64]
    q_tiles: jax.Array  # of both consumers
    o_tiles: jax.Array  # their outputs, `out_width` columns at a time
    k_tiles: jax.Array
    v_tiles: jax.Array
    lse_tiles: jax.Array
    q_here: jax.Array
    q_free: jax.Array
    k_here: jax.Array
    v_here: jax.Array
    k_free: jax.Array
    v_free: jax.Array
    turns: jax.Array  # of consumers 0 and 1


class Item(NamedTuple):
    """What a block does next: one query tile of one kv head. Scalars."""

    tile: jax.Array  # in the list
    part: jax.Array  # kv head * parts + part
    at: Tiles  # its line; a dead one has count 0


def out_width(H: int) -> int:
    """Columns of the outputs in shared memory: their lines begin at multiples of 128 bytes, as TMA wants."""
    return 64 if H > 128 else -(-H // 64) * 64


def shared_memory(sizes: Sizes, dtype: jnp.dtype) -> list:
    """What a block has, in the order of `Refs`: tiles, then barriers."""
    s, H, stages = sizes.tile, sizes.H, sizes.stages
    boxes = swizzled(box_bytes(2 * H), 2)
    ring = plgpu.SMEM((stages, s, H), dtype, transforms=boxes)
    copied = plgpu.Barrier(num_arrivals=s // min(sizes.C, s), num_barriers=stages)
    left = plgpu.Barrier(num_arrivals=2, num_barriers=stages)
    return [
        plgpu.SMEM((2, ROWS, H), dtype, transforms=boxes),
        plgpu.SMEM((2, ROWS, out_width(H)), dtype),
        ring,
        ring,
        plgpu.SMEM((2, ROWS), jnp.float32),
        plgpu.Barrier(num_arrivals=2 * sizes.own_heads),
        plgpu.Barrier(num_arrivals=2),
        copied,
        copied,
        left,
        left,
        plgpu.Barrier(num_barriers=2),
    ]


def item(refs: Refs, sizes: Sizes, turn: jax.Array) -> Item:
    """The block's item of this turn. Every second turn deals backwards, so that nobody always gets the longest."""
    block = lax.axis_index("block")
    index = turn * sizes.blocks + jnp.where(lax.rem(turn, 2) == 0, block, sizes.blocks - 1 - block)
    columns = sizes.K * sizes.parts
    tile = lax.div(index, columns)
    live = tile < refs.total[0]
    tile = jnp.minimum(tile, refs.tiles.shape[0] - 1)
    at = Tiles(*[refs.tiles[tile, column] for column in range(9)], refs.total[0])
    return Item(tile, lax.rem(index, columns), at._replace(count=jnp.where(live, at.count, 0)))


def turns_of_block(refs: Refs, sizes: Sizes) -> jax.Array:
    """How many items a block has, the last of which may be dead."""
    items = refs.total[0] * (sizes.K * sizes.parts)
    return lax.div(items + (sizes.blocks - 1), sizes.blocks)


def heads_of(sizes: Sizes, what: Item, group: int | jax.Array) -> tuple[jax.Array, jax.Array]:
    """The kv head of an item, and the consumer's first query head among the G of that kv head."""
    kv_head, part = lax.div(what.part, sizes.parts), lax.rem(what.part, sizes.parts)
    return kv_head, part * sizes.heads + group * sizes.next_head


def produce(refs: Refs, sizes: Sizes) -> None:
    """Copy queries once, keys and values tile after tile into the ring, for each of the block's items."""
    plgpu.set_max_registers(40, action="decrease")
    s, stages = sizes.tile, sizes.stages
    piece = min(sizes.C, s)

    def one(turn, done):
        what = item(refs, sizes, turn)
        at, head = what.at, lax.div(what.part, sizes.parts)

        @pl.loop(0, at.count)
        def _(index):
            places = [where(refs, sizes, at, index * s + offset) for offset in range(0, s, piece)]
            slot = lax.rem(done + index, stages)

            def fill(pool, ring, here, free):
                pl.when(done + index >= stages)(lambda: plgpu.barrier_wait(free.at[slot]))
                for j, (block, offset) in enumerate(places):
                    goal = ring.at[slot, pl.ds(j * piece, piece)]
                    plgpu.copy_gmem_to_smem(pool.at[block, head, pl.ds(offset, piece)], goal, here.at[slot])

            fill(refs.k_PKCH, refs.k_tiles, refs.k_here, refs.k_free)
            pl.when(index == 0)(lambda: fetch_queries(refs, sizes, what, done))
            fill(refs.v_PKCH, refs.v_tiles, refs.v_here, refs.v_free)

        return done + at.count

    done = lax.fori_loop(0, turns_of_block(refs, sizes), one, jnp.int32(0))

    # Every phase of a barrier has to be seen by somebody.
    @pl.loop(jnp.maximum(done - stages, 0), done)
    def _(index):
        plgpu.barrier_wait(refs.k_free.at[lax.rem(index, stages)])
        plgpu.barrier_wait(refs.v_free.at[lax.rem(index, stages)])

    pl.when(done > 0)(lambda: plgpu.barrier_wait(refs.q_free))


def fetch_queries(refs: Refs, sizes: Sizes, what: Item, done: jax.Array) -> None:
    """Copy the queries of both consumers; their places are free once the item before is done."""
    pl.when(done > 0)(lambda: plgpu.barrier_wait(refs.q_free))
    for group in range(2):
        kv_head, head = heads_of(sizes, what, group)
        token = pl.multiple_of(what.at.token + group * sizes.next_token, BOX)
        for j in range(sizes.own_heads):
            n = kv_head * sizes.G + jnp.minimum(head + j, sizes.G - 1)  # a surplus head is some other's double
            goal = refs.q_tiles.at[group, pl.ds(j * sizes.own_tokens, sizes.own_tokens)]
            plgpu.copy_gmem_to_smem(refs.q_TNH.at[pl.ds(token, sizes.own_tokens), n], goal, refs.q_here)


def where(refs: Refs, sizes: Sizes, at: Tiles, place: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Block and offset of the positions from `place` on, as many as fit a block and a tile.

    Of positions that nobody sees the table may say anything: block 0 stands for them, and is cleared.
    """
    piece = min(sizes.C, sizes.tile)
    position = at.first * sizes.tile + place
    block = refs.table_BM[at.row, jnp.minimum(lax.div(position, sizes.C), sizes.M - 1)]
    seen = (place < at.end) & (place + piece > at.begin)
    offset = lax.rem(position, sizes.C) if piece < sizes.C else 0
    return jnp.where(seen, block, 0) + refs.base[0], pl.multiple_of(offset, piece)
