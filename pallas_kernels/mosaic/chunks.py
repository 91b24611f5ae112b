"""Attention of rows with any number of tokens, as one kernel for Hopper: tensor cores fed by TMA.

A block of threads is a producer, which copies tiles of s positions into shared memory, and two consumers of 64
rows each, which take turns on the tensor cores: while one multiplies, the other does its softmax.

    producer     K0 V0 K1 V1 ..    into a ring of stages, each tile as soon as both consumers left its place
    consumer 0   QK0 . softmax . PV0 QK1 . softmax . PV1 ..
    consumer 1         QK0 . softmax . PV0 QK1 . softmax ..

The rows of a tile are `heads` query heads of one kv head times 128 // heads tokens, so short rows fill tiles and
keys are read once for all those heads. Queries are read where they are, and outputs written where they belong:
no copy of either in another order is made. A row's last tile writes token by token, not to touch its neighbour.

    heads 8, t 16     consumer 0: heads 0..3 x 16 tokens     consumer 1: heads 4..7 x the same tokens
    heads 1, t 128    consumer 0: tokens 0..63               consumer 1: tokens 64..127

One block runs on each multiprocessor and takes every so many places of the work list (`tiles`), so the
producer fetches the next tile's keys while the consumers write the last one's outputs.

Values that nobody sees may be NaN, and 0 * NaN is NaN: where a tile of positions begins before all that is seen
or ends past all that is written, consumer 0 clears those values in shared memory before either multiplies them.

Bits: tiles of positions stand at multiples of s and are met in order, and a tile that a token cannot see adds
exactly nothing to its sums. With `ordered` every tile takes the same instructions (else the ones that are seen
whole skip the mask), so the bits of a token depend on the positions before it and on s alone.
Cost: 4 H s flops a row and tile; keys and values once per query tile. Source: FlashAttention-3, ragged and paged.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic.tiles import Tiles, list_tiles, places
from pallas_kernels.pools import Pool, Scaled
from pallas_kernels.rows import Rows
from pallas_kernels.shape import Shape
from pallas_kernels.target import H200, Target

ROWS = 64  # of a consumer: what one tensor core instruction takes
NOTHING = -1e30  # the score of an unseen position: finite, so that a row that saw nothing yet gives no NaN
NOTHING_YET = -1e20  # tops below it are of rows that saw nothing
LOG2_E = math.log2(math.e)
HEAD_WIDTHS = (64, 80, 96, 128, 256)
SHARED_BYTES = 232448 - 4096  # of a Hopper multiprocessor, less what barriers and padding may take


class Config(NamedTuple):
    """What may be tuned; every value gives the same attention."""

    tile: int  # positions
    stages: int
    heads: int  # query heads of a tile, a power of two
    ordered: bool = False  # one path for all tiles, so that bits do not depend on what shares the tile


class Sizes(NamedTuple):
    """What a kernel is compiled for."""

    config: Config
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
        return max(1, self.config.heads // 2)

    @property
    def own_tokens(self) -> int:
        """Tokens of one consumer."""
        return ROWS // self.own_heads

    @property
    def next_token(self) -> int:
        """How many tokens after consumer 0's those of consumer 1 begin."""
        return self.own_tokens if self.config.heads == 1 else 0

    @property
    def next_head(self) -> int:
        """The same for query heads."""
        return 0 if self.config.heads == 1 else self.own_heads


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
    turns: jax.Array


class Item(NamedTuple):
    """What a block does next: one query tile of one kv head. Scalars."""

    tile: jax.Array  # in the list
    part: jax.Array  # kv head * parts + part
    at: Tiles  # its line; a dead one has count 0


class See(NamedTuple):
    """Places on the line of positions that a block meets, one item's after the other's. Scalars."""

    place: jax.Array  # of the consumer's first token
    begin: jax.Array
    end: jax.Array


class Running(NamedTuple):
    """Softmax so far of a consumer's 64 rows; tops in units of log 2."""

    total_rH: jax.Array
    top_r: jax.Array
    mass_r: jax.Array


def unserved(target: Target, shape: Shape) -> str | None:
    """Why this kernel cannot serve the shape, in words."""
    if (target.platform, target.arch) != ("cuda", 90):
        return f"needs compute capability 9.0, not {target.platform} {target.arch / 10}"
    if shape.dtype not in ("bfloat16", "float16") or shape.dtype != shape.pool_dtype:
        return f"multiplies bfloat16 or float16 by the same, not {shape.dtype} by {shape.pool_dtype}"
    if shape.head_width not in HEAD_WIDTHS:
        return f"head width {shape.head_width} is not one of {HEAD_WIDTHS}"
    if shape.block % 8 or ROWS % shape.block and shape.block % ROWS:
        return f"blocks of {shape.block} positions are no divisor of 64 from 8 on, nor a multiple"
    return None


def rule(shape: Shape, tokens: int, rows: int, ordered: bool = False) -> Config:
    """What to use where nothing was tuned, for steps of so many tokens in so many rows.

    Long rows fill tiles of any heads, so the query heads are dealt without rest; short ones want all in a tile.
    """
    tile = 64 if ordered or shape.head_width > 128 or shape.block % 128 and 128 % shape.block else 128
    free_bytes = SHARED_BYTES - 2 * ROWS * 2 * (shape.head_width + out_width(shape.head_width))
    stages = min(4, free_bytes // (4 * tile * shape.head_width))
    whole = next(heads for heads in (16, 8, 4, 2, 1) if shape.group % heads == 0)
    packed = next((heads for heads in (1, 2, 4, 8) if heads >= shape.group), 16)
    long = tokens > 16 * rows and 8 * shape.group < 7 * packed
    return Config(tile, stages, whole if long else packed, ordered)


def out_width(H: int) -> int:
    """Columns of the outputs in shared memory: their lines begin at multiples of 128 bytes, as TMA wants."""
    return 64 if H > 128 else -(-H // 64) * 64


def attend(
    q_TNH: jax.Array,
    k: Pool,
    v: Pool,
    rows: Rows,
    *,
    base: int | jax.Array,
    scale: float,
    window: int | None,
    soft_cap: float | None = None,
    sinks_N: jax.Array | None = None,
    target: Target = H200,
    config: Config | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Each token of a row sees the row's positions up to its own; rows with count 0 are skipped.

    What stands in the places of tokens that belong to no row is undefined.
    Returns [T, N, H] in q's dtype and the log of each softmax's mass [T, N], float32.
    Raises ValueError for what `unserved` names.
    """
    if isinstance(k, Scaled) or isinstance(v, Scaled):
        raise ValueError("pools of 8 bits: got Scaled; expected plain ones, as `unserved` says")
    T, N, H = q_TNH.shape
    _, K, C, _ = k.shape
    shape = Shape(N // K, H, C, q_TNH.dtype.name, k.dtype.name)
    if (reason := unserved(target, shape)) is not None:
        raise ValueError(reason)
    B, M = rows.table_BM.shape
    config = config or rule(shape, T, B)
    t = 2 * ROWS // config.heads
    parts = -(-shape.group // config.heads)
    q_TNH = jnp.pad(q_TNH, ((0, max(t - T, 0)), (0, 0), (0, 0)))
    tiles = list_tiles(rows, len(q_TNH), t, config.tile, window)
    blocks = min(target.cores, len(tiles.token) * K * parts)
    sizes = Sizes(config, K, shape.group, H, C, M, parts, blocks, scale, window, soft_cap, sinks_N is not None)
    inputs = (q_TNH, k, v, rows.table_BM, tiles.packed(), tiles.total, jnp.asarray(base, jnp.int32).reshape(1))
    o_TNH, lse = launch(sizes, *inputs, spread(sinks_N, sizes))
    tile_T, place_T = places(rows, tiles, T, t)
    lse_WNt = lse.reshape(-1, K, parts * config.heads, t)[:, :, : shape.group].reshape(-1, N, t)
    return o_TNH[:T], lse_WNt[tile_T, :, place_T]


def spread(sinks_N: jax.Array | None, sizes: Sizes) -> jax.Array:
    """The sink of each row of each consumer, in units of log 2: [K * parts, 2, 64]."""
    K, parts, heads = sizes.K, sizes.parts, sizes.config.heads
    if sinks_N is None:
        return jnp.zeros((K * parts, 2, ROWS), jnp.float32)
    sinks_KG = sinks_N.astype(jnp.float32).reshape(K, sizes.G) * LOG2_E
    sinks_KG = jnp.pad(sinks_KG, ((0, 0), (0, parts * heads - sizes.G)))
    return jnp.repeat(sinks_KG, 2 * ROWS // heads, axis=1).reshape(K * parts, 2, ROWS)


def launch(sizes: Sizes, *inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Compile and call the kernel."""
    q_TNH, tiles = inputs[0], inputs[4]
    s, stages, heads, _ = sizes.config
    H, dtype = sizes.H, q_TNH.dtype
    swizzle = math.gcd(2 * H, 128)
    transforms = (plgpu.TilingTransform((8, swizzle // 2)), plgpu.SwizzleTransform(swizzle))
    copies = s // min(sizes.C, s)
    ring = plgpu.SMEM((stages, s, H), dtype, transforms=transforms)
    kernel = plgpu.kernel(
        functools.partial(work, sizes=sizes),
        out_type=[
            jax.ShapeDtypeStruct(q_TNH.shape, dtype),
            jax.ShapeDtypeStruct((len(tiles), sizes.K * sizes.parts, 2, ROWS), jnp.float32),
        ],
        scratch_types=[
            plgpu.SMEM((2, ROWS, H), dtype, transforms=transforms),
            plgpu.SMEM((2, ROWS, out_width(H)), dtype),
            ring,
            ring,
            plgpu.SMEM((2, ROWS), jnp.float32),
            plgpu.Barrier(num_arrivals=2 * sizes.own_heads),
            plgpu.Barrier(num_arrivals=2),
            plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
            plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            plgpu.Barrier(num_arrivals=2),
        ],
        grid=(sizes.blocks,),
        grid_names=("block",),
        num_threads=3,
        thread_name="group",
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
    )
    return kernel(*inputs)


def work(*refs: jax.Array, sizes: Sizes) -> None:
    """One block of threads; groups 0 and 1 consume, group 2 produces."""
    group = lax.axis_index("group")
    pl.when(group < 2)(lambda: consume(Refs(*refs), sizes, group))
    pl.when(group == 2)(lambda: produce(Refs(*refs), sizes))


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


def produce(refs: Refs, sizes: Sizes) -> None:
    """Copy queries once, keys and values tile after tile into the ring, for each of the block's items."""
    plgpu.set_max_registers(40, action="decrease")
    s, stages = sizes.config.tile, sizes.config.stages
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
        token = what.at.token + group * sizes.next_token
        for j in range(sizes.own_heads):
            n = kv_head * sizes.G + jnp.minimum(head + j, sizes.G - 1)  # a surplus head is some other's double
            goal = refs.q_tiles.at[group, pl.ds(j * sizes.own_tokens, sizes.own_tokens)]
            plgpu.copy_gmem_to_smem(refs.q_TNH.at[pl.ds(token, sizes.own_tokens), n], goal, refs.q_here)


def where(refs: Refs, sizes: Sizes, at: Tiles, place: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Block and offset of the positions from `place` on, as many as fit a block and a tile.

    Of positions that nobody sees the table may say anything: block 0 stands for them, and is cleared.
    """
    piece = min(sizes.C, sizes.config.tile)
    position = at.first * sizes.config.tile + place
    block = refs.table_BM[at.row, jnp.minimum(lax.div(position, sizes.C), sizes.M - 1)]
    seen = (place < at.end) & (place + piece > at.begin)
    offset = lax.rem(position, sizes.C) if piece < sizes.C else 0
    return jnp.where(seen, block, 0) + refs.base[0], pl.multiple_of(offset, piece)


def consume(refs: Refs, sizes: Sizes, group: jax.Array) -> None:
    """Attention of 64 rows of each of the block's items."""
    plgpu.set_max_registers(232, action="increase")

    def one(turn, done):
        what = item(refs, sizes, turn)

        @pl.when(what.at.count > 0)
        def _():
            plgpu.barrier_wait(refs.q_here)
            pl.when(group == 1)(lambda: take_turn(refs))

        state = meet_all(refs, sizes, what.at, group, done, nothing_yet(refs, sizes, what, group))
        what = item(refs, sizes, turn)  # read anew, since registers are scarce in between

        @pl.when(what.at.count > 0)
        def _():
            pl.when(group == 0)(lambda: take_turn(refs))
            plgpu.barrier_arrive(refs.q_free)
            finish(refs, sizes, what, group, state)

        return done + what.at.count

    lax.fori_loop(0, turns_of_block(refs, sizes), one, jnp.int32(0))
    plgpu.wait_smem_to_gmem(0)


def heads_of(sizes: Sizes, what: Item, group: int | jax.Array) -> tuple[jax.Array, jax.Array]:
    """The kv head of an item, and the consumer's first query head among the G of that kv head."""
    kv_head, part = lax.div(what.part, sizes.parts), lax.rem(what.part, sizes.parts)
    return kv_head, part * sizes.config.heads + group * sizes.next_head


def finish(refs: Refs, sizes: Sizes, what: Item, group: jax.Array, state: Running) -> None:
    """Divide by the masses and write what is ready, while the next item's queries come."""
    width, size = out_width(sizes.H), sizes.own_tokens
    share_r = jnp.where(state.mass_r > 0, 1.0 / state.mass_r, 0.0)
    o_rH = state.total_rH * lax.broadcast_in_dim(share_r, state.total_rH.shape, [0])
    o_rH = o_rH.astype(refs.o_TNH.dtype)
    lse_r = (state.top_r + jnp.log2(state.mass_r)) * (1 / LOG2_E)
    kv_head, head = heads_of(sizes, what, group)
    for column in range(0, sizes.H, width):
        columns = min(width, sizes.H - column)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # what was written last is read
        refs.o_tiles[group, :, pl.ds(0, columns)] = o_rH[:, column : column + columns]
        if not column:
            refs.lse_tiles[group] = lse_r
        plgpu.commit_smem()
        if not column:
            plgpu.copy_smem_to_gmem(refs.lse_tiles.at[group], refs.lse.at[what.tile, what.part, group])
        for j in range(sizes.own_heads):
            source = refs.o_tiles.at[group, pl.ds(j * size, size), pl.ds(0, columns)]
            n = kv_head * sizes.G + jnp.minimum(head + j, sizes.G - 1)
            goal = refs.o_TNH.at[:, n, pl.ds(column, columns)]
            token, apart = group * sizes.next_token, columns < width
            pl.when(head + j < sizes.G)(functools.partial(write, source, goal, what.at, token, apart))


def write(source: jax.Array, goal_TH: jax.Array, at: Tiles, token: jax.Array, apart: bool) -> None:
    """Copy the outputs of one head to their tokens; `token` is the consumer's first within the tile.

    apart    lines of the source do not follow each other, which a copy of several would need
    """
    size = source.shape[0]
    low, high = (jnp.clip(edge - token, 0, size) for edge in (at.low, at.high))

    def one_by_one():
        @pl.loop(low, high)
        def _(i):
            plgpu.copy_smem_to_gmem(source.at[pl.ds(i, 1)], goal_TH.at[pl.ds(at.token + token + i, 1)])

    if apart:
        return one_by_one()
    whole = (low == 0) & (high == size)
    goal_tH = goal_TH.at[pl.ds(at.token + token, size)]
    pl.when(whole)(lambda: plgpu.copy_smem_to_gmem(source, goal_tH))
    pl.when(jnp.logical_not(whole))(one_by_one)


def take_turn(refs: Refs) -> None:
    """Both consumers meet: what one did before is seen by the other after."""
    plgpu.barrier_arrive(refs.turns)
    plgpu.barrier_wait(refs.turns)


def nothing_yet(refs: Refs, sizes: Sizes, what: Item, group: jax.Array) -> Running:
    """The softmax of no position; a sink is a score without a value."""
    column = plgpu.Layout.WGMMA.reduce(1)
    total_rH = plgpu.layout_cast(jnp.zeros((ROWS, sizes.H), jnp.float32), plgpu.Layout.WGMMA)
    if sizes.sinks:
        sink_r = plgpu.load(refs.sinks.at[what.part, group], layout=column, optimized=False)
        return Running(total_rH, sink_r, plgpu.layout_cast(jnp.ones((ROWS,), jnp.float32), column))
    top_r = plgpu.layout_cast(jnp.full((ROWS,), NOTHING, jnp.float32), column)
    return Running(total_rH, top_r, plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), column))


def meet_all(refs: Refs, sizes: Sizes, at: Tiles, group: jax.Array, done: jax.Array, state: Running) -> Running:
    """Meet the item's tiles of positions in order. Those in the middle are seen whole and need no mask."""
    s, window, token = sizes.config.tile, sizes.window, group * sizes.next_token
    shift = done * s  # the loops count on from the block's last tile, and so do the places they compare with
    see = See(*(shift + place for place in (at.place + token, at.begin, at.end)))
    masked, whole = (functools.partial(meet, refs, sizes, see, group, masked=masked) for masked in (True, False))
    last = done + at.count
    if sizes.config.ordered or (window is not None and sizes.H > 128):  # three loops would not fit the registers
        return lax.fori_loop(done, last, masked, state)
    low, high = (jnp.clip(edge, token, token + sizes.own_tokens) for edge in (at.low, at.high))
    end = jnp.clip(done + lax.div(at.place + low + 1, s), done, last)
    begin = done
    if window is not None:
        unseen = jnp.maximum(at.place + high - window, 0)  # before what its last token sees
        begin = jnp.clip(done + lax.div(unseen + (s - 1), s), done, end)
        state = lax.fori_loop(done, begin, masked, state)
    state = lax.fori_loop(begin, end, whole, state)
    return lax.fori_loop(end, last, masked, state)


def meet(
    refs: Refs, sizes: Sizes, see: See, group: jax.Array, index: jax.Array, state: Running, *, masked: bool
) -> Running:
    """Add one tile of positions to the running softmax; `index` counts the block's tiles."""
    s, H = sizes.config.tile, sizes.H
    slot = lax.rem(index, sizes.config.stages)
    early = clear(refs, sizes, see, group, index) if masked else False
    plgpu.barrier_wait(refs.k_here.at[slot])

    def score(sum_rs):
        plgpu.wgmma(sum_rs, refs.q_tiles.at[group], refs.k_tiles.at[slot].transpose((1, 0)))
        take_turn(refs)
        return sum_rs[...]

    scores_rs = pl.run_scoped(score, plgpu.ACC((ROWS, s), jnp.float32))
    plgpu.barrier_arrive(refs.k_free.at[slot])
    factor = sizes.scale * LOG2_E
    if sizes.soft_cap is not None:
        factor = sizes.soft_cap * LOG2_E
        scores_rs = tanh(scores_rs * (sizes.scale / sizes.soft_cap))
    if masked:
        scores_rs = jnp.where(seen(sizes, see, index), scores_rs, NOTHING)
    top_r = jnp.maximum(state.top_r, scores_rs.max(axis=1) * factor)
    keep_r = jnp.exp2(state.top_r - top_r)
    # Below a real top, exp2 makes exactly 0 of what is unseen; where nothing was seen yet, below 0.
    level_r = jnp.where(top_r > NOTHING_YET, top_r, 0.0) if masked else top_r
    weights_rs = jnp.exp2(scores_rs * factor - lax.broadcast_in_dim(level_r, scores_rs.shape, [0]))
    total_rH = state.total_rH * lax.broadcast_in_dim(keep_r, state.total_rH.shape, [0])
    mass_r = state.mass_r * keep_r + weights_rs.sum(axis=1)
    weights_rs = weights_rs.astype(refs.v_PKCH.dtype)
    plgpu.barrier_arrive(refs.turns)
    if masked:
        pl.when(jnp.logical_not(early))(lambda: plgpu.barrier_wait(refs.v_here.at[slot]))
    else:
        plgpu.barrier_wait(refs.v_here.at[slot])
    plgpu.barrier_wait(refs.turns)

    def add(sum_rH):
        sum_rH[...] = total_rH
        plgpu.wgmma(sum_rH, weights_rs, refs.v_tiles.at[slot])
        return sum_rH[...]

    total_rH = pl.run_scoped(add, plgpu.ACC((ROWS, H), jnp.float32))
    plgpu.barrier_arrive(refs.v_free.at[slot])
    return Running(total_rH, top_r, mass_r)


def tanh(x: jax.Array) -> jax.Array:
    """By way of exp2 and rsqrt: tanh.approx errs by 5e-4 of its result, which a cap of 50 makes 0.02 of a score."""
    root = lax.rsqrt(1.0 + jnp.exp2(x * (2 * LOG2_E)))
    return 1.0 - 2.0 * (root * root)


def seen(sizes: Sizes, see: See, index: jax.Array) -> jax.Array:
    """[64, s]: which positions of a tile each row sees. Rows are heads times tokens, tokens last."""
    shape = (ROWS, sizes.config.tile)
    row_rs = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=plgpu.Layout.WGMMA)
    place_rs = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA)
    token_rs = row_rs & (sizes.own_tokens - 1)
    back_rs = (see.place - index * sizes.config.tile) + token_rs - place_rs  # from the token to the position
    return back_rs >= 0 if sizes.window is None else (back_rs >= 0) & (back_rs < sizes.window)


def clear(refs: Refs, sizes: Sizes, see: See, group: jax.Array, index: jax.Array) -> jax.Array:
    """Set the values of a tile that nobody sees to 0, and tell whether it had any and they were waited for."""
    s, H = sizes.config.tile, sizes.H
    width = 64 if H % 64 == 0 else H
    slot = lax.rem(index, sizes.config.stages)
    low = jnp.int32(0) if sizes.window is None else see.begin - index * s
    high = see.end - index * s
    mine = (group == 0) & ((low > 0) | (high < s))

    @pl.when(mine)
    def _():
        plgpu.barrier_wait(refs.v_here.at[slot])
        for row in range(0, s, ROWS):
            place_rh = row + plgpu.broadcasted_iota(jnp.int32, (ROWS, width), 0, layout=plgpu.Layout.WGMMA)
            seen_rh = (place_rh >= low) & (place_rh < high)
            for column in range(0, H, width):
                piece = refs.v_tiles.at[slot, pl.ds(row, ROWS), pl.ds(column, width)]
                v_rh = plgpu.load(piece, layout=plgpu.Layout.WGMMA)
                piece[...] = jnp.where(seen_rh, v_rh, jnp.zeros_like(v_rh))
        plgpu.commit_smem()

    return mine
