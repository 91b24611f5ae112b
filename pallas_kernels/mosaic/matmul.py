"""Products with 4-bit weights in groups, as a kernel for Hopper: columns are the long side of the tensor core.

out^T[X, T] = numbers^T[X, D] . x^T[D, T], group by group, each times its scale. Two bytes of a column are a word of
four numbers, which becomes four operands in registers, one for each place in a word; x comes taken apart likewise:

    words of a column    3210 7654 ba98 ..      4-bit numbers, by their row of the weights
    operand 0            0 4 8 ..               (word & 15) ^ 0x4308 are the bits of 136 + number in bfloat16
    operand 1            1 5 9 ..               the same of word >> 4
    x, taken apart       0 4 8 .. | 1 5 9 .. | 2 6 a .. | 3 7 b ..

A program is one producer and up to four consumers. It takes an even share of all steps, 256 rows of a tile of
columns each, and writes one partial sum for every tile that it meets; XLA adds those of a tile:

    tiles of columns   [ 0 0 0 0 | 1 1 1 1 | 2 2 2 2 ]
    programs           [ a a a | b b b | c c c | d d d ]   tile 0 = a + b, tile 1 = b + c, tile 2 = c + d

Cost: the weights once for every 64 tokens; 4 bytes a column and token for each partial sum, written and read. By
the count of its PTX a weight takes 2.3 instructions, which a multiprocessor issues in three quarters of the time in
which its bytes come. Compiled for an H200 it takes 74 to 96 registers up to 24 tokens, 113 to 159 above, and spills
none.
Rejected: int8 pairs in place of words (3.7 instructions a weight: loads must be shuffled between lanes); an even
number of splits (15% of the device idle for 28672 columns); four consumers for 32 tokens (spills).
Source: Marlin and CUTLASS (how 4-bit numbers become floats); Stream-K (even shares).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic.memory import ROWS, load, swizzled
from pallas_kernels.quantised import GROUP, Grouped
from pallas_kernels.target import H200, Target

STEP_ROWS = 2 * GROUP  # of the weights: 64 words of every column
WORDS, PLACES = 64, 4
MOST_TOKENS = 256
FEW_TOKENS, TOKENS = 24, 64  # of a tile: the most that leave registers for four consumers, and for two
SHARED_BYTES = 227 * 1024
BIAS = {"bfloat16": (0x4308, 136), "float16": (0x6408, 1032)}  # bits of 2^7 + 8, 2^10 + 8, and these numbers
L = plgpu.Layout


class Config(NamedTuple):
    """What may be tuned; sums are parted otherwise, and differ by rounding."""

    consumers: int  # warpgroups, of 64 columns each
    stages: int  # steps that a program holds
    programs: int  # for each tile of tokens


class Sizes(NamedTuple):
    """One product, in tiles."""

    t: int
    consumers: int
    stages: int
    programs: int
    tiles: int  # of columns
    steps: int  # of a tile
    dtype: jnp.dtype

    @property
    def x(self) -> int:
        """Columns of a tile."""
        return ROWS * self.consumers

    def owner(self, step):
        """The program that does a step, of all tiles' steps in order; program i begins at i * all // programs."""
        return ((step + 1) * self.programs - 1) // (self.tiles * self.steps)


class Refs(NamedTuple):
    """What a program sees: global memory, then its shared memory and barriers."""

    x_4TD: object
    words_XD: object
    scales_DX: object
    sums: object
    x_tiles: object
    word_tiles: object
    scale_tiles: object
    here: object
    free: object


def tokens_of(T: int) -> int:
    """Tokens of a tile, for T of them."""
    return min(-(-T // 8) * 8, TOKENS)


def rule(target: Target, T: int, D: int, X: int) -> Config:
    """As many consumers as divide the columns and have registers, and as many stages as fit."""
    t = tokens_of(T)
    consumers = next(n for n in (4, 2, 1) if X % (n * ROWS) == 0 and (n <= 2 or t <= FEW_TOKENS))
    stage = STEP_ROWS * (ROWS * consumers // 2 + 2 * t) + 2 * 4 * ROWS * consumers
    steps = X // (ROWS * consumers) * (D // STEP_ROWS)
    return Config(consumers, min(6, SHARED_BYTES // stage), min(max(1, target.cores // (-(-T // t))), steps))


def unserved(target: Target, x_TD: jax.Array, w: Grouped) -> str | None:
    """Why this kernel cannot multiply these, in words."""
    (T, D), X = x_TD.shape, w.shape[1]
    if target.platform != "cuda" or target.arch != 90:
        return "it is for compute capability 9.0"
    if x_TD.dtype.name not in BIAS:
        return f"tokens of {x_TD.dtype} would be rounded"
    if D % STEP_ROWS or X % ROWS:
        return f"{D} rows and {X} columns are no multiples of {STEP_ROWS} and {ROWS}"
    if T > MOST_TOKENS:
        return f"{T} tokens are more than {MOST_TOKENS}, where a copy of the weights in two bytes costs less"
    return None


def matmul(x_TD: jax.Array, w: Grouped, *, target: Target = H200, config: Config | None = None) -> jax.Array:
    """x times the weights that `w` stands for; float32 [T, X]. `unserved` says what may come."""
    (T, D), X = x_TD.shape, w.shape[1]
    config = config or rule(target, T, D, X)
    t = tokens_of(T)
    tiles, steps = X // (ROWS * config.consumers), D // STEP_ROWS
    sizes = Sizes(t, config.consumers, config.stages, config.programs, tiles, steps, x_TD.dtype)
    x_4TD = jnp.pad(x_TD, ((0, -T % t), (0, 0))).reshape(-1, D // PLACES, PLACES).transpose(2, 0, 1)
    words_XD = lax.bitcast_convert_type(w.pairs_XD.reshape(X, D // PLACES, 2), jnp.int16)
    sums = partial_sums(x_4TD, words_XD, w.scales_DX, sizes)
    first = sizes.owner(np.arange(tiles) * steps)
    used = np.arange(sums.shape[1]) <= (sizes.owner(np.arange(1, tiles + 1) * steps - 1) - first)[:, None]
    y_XT = jnp.where(used[:, :, None, None], sums, 0).sum(axis=1).reshape(X, -1)
    return y_XT.T[:T]


def partial_sums(x_4TD: jax.Array, words_XD: jax.Array, scales_DX: jax.Array, sizes: Sizes) -> jax.Array:
    """[tiles of columns, parts, x, T]; what lies beyond a tile's own parts is undefined."""
    _, T, _ = x_4TD.shape
    first = sizes.owner(np.arange(sizes.tiles) * sizes.steps)
    parts = int((sizes.owner(np.arange(1, sizes.tiles + 1) * sizes.steps - 1) - first).max()) + 1
    stages, t, x = sizes.stages, sizes.t, sizes.x
    return plgpu.kernel(
        lambda *refs: program(Refs(*refs), sizes),
        out_type=jax.ShapeDtypeStruct((sizes.tiles, parts, x, T), jnp.float32),
        scratch_types=[
            plgpu.SMEM((stages, PLACES, t, WORDS), sizes.dtype, transforms=swizzled(64, 2)),  # a group a box
            plgpu.SMEM((stages, x, WORDS), jnp.int16, transforms=swizzled(128, 2)),
            plgpu.SMEM((stages, 2, x), jnp.float32),
            plgpu.Barrier(num_arrivals=3, num_barriers=stages),
            plgpu.Barrier(num_arrivals=sizes.consumers, num_barriers=stages),
        ],
        grid=(sizes.programs, T // t),
        grid_names=("program", "token"),
        num_threads=sizes.consumers + 1,
        thread_name="warpgroup",
        kernel_name="mosaic_matmul",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )(x_4TD, words_XD, scales_DX)


def program(refs: Refs, sizes: Sizes) -> None:
    """All warpgroups of one program: an even share of the steps."""
    index = lax.axis_index("program")
    begin, end = (lax.div(i * (sizes.tiles * sizes.steps), sizes.programs) for i in (index, index + 1))
    consumer = lax.axis_index("warpgroup") < sizes.consumers
    pl.when(consumer)(lambda: consume(refs, sizes, begin, end))
    pl.when(jnp.logical_not(consumer))(lambda: produce(refs, sizes, begin, end))


def produce(refs: Refs, sizes: Sizes, begin: jax.Array, end: jax.Array) -> None:
    """Fetch the steps in order, and see every place empty at the end."""
    tokens = pl.ds(lax.axis_index("token") * sizes.t, sizes.t)

    def fetch(n):
        slot = lax.rem(n - begin, sizes.stages)
        tile, step = lax.div(n, sizes.steps), lax.rem(n, sizes.steps)
        columns, words = pl.ds(tile * sizes.x, sizes.x), pl.ds(step * WORDS, WORDS)
        pl.when(n - begin >= sizes.stages)(lambda: plgpu.barrier_wait(refs.free.at[slot]))
        here = refs.here.at[slot]
        plgpu.copy_gmem_to_smem(refs.words_XD.at[columns, words], refs.word_tiles.at[slot], here)
        plgpu.copy_gmem_to_smem(refs.x_4TD.at[:, tokens, words], refs.x_tiles.at[slot], here)
        plgpu.copy_gmem_to_smem(refs.scales_DX.at[pl.ds(2 * step, 2), columns], refs.scale_tiles.at[slot], here)

    pl.loop(begin, end)(fetch)
    count = end - begin
    pl.loop(jnp.maximum(count - sizes.stages, 0), count)(
        lambda n: plgpu.barrier_wait(refs.free.at[lax.rem(n, sizes.stages)])
    )


def consume(refs: Refs, sizes: Sizes, begin: jax.Array, end: jax.Array) -> None:
    """Sum the steps of each tile that the share meets."""
    columns = pl.ds(lax.axis_index("warpgroup") * ROWS, ROWS)
    tokens = pl.ds(lax.axis_index("token") * sizes.t, sizes.t)

    def tile_sum(tile):
        first = tile * sizes.steps
        add = functools.partial(add_step, refs, sizes, begin, columns)
        zeros = plgpu.layout_cast(jnp.zeros((ROWS, sizes.t), jnp.float32), L.WGMMA)
        total = lax.fori_loop(jnp.maximum(begin, first), jnp.minimum(end, first + sizes.steps), add, zeros)
        part = lax.axis_index("program") - lax.div(
            (first + 1) * sizes.programs - 1, jnp.int32(sizes.tiles * sizes.steps)
        )
        refs.sums.at[tile, part, columns, tokens][...] = total

    pl.loop(lax.div(begin, sizes.steps), lax.div(end - 1, sizes.steps) + 1)(tile_sum)


def add_step(refs: Refs, sizes: Sizes, begin: jax.Array, columns, n: jax.Array, total_xt: jax.Array) -> jax.Array:
    """Two groups of rows more: a product for each place of the words, scaled once they are added."""
    slot = lax.rem(n - begin, sizes.stages)
    plgpu.barrier_wait(refs.here.at[slot])
    words_xw = load(refs.word_tiles.at[slot, columns], L.WGMMA)
    operands = [numbers(words_xw, place, sizes.dtype) for place in range(PLACES)]
    for group in range(2):
        half = slice(group * WORDS // 2, (group + 1) * WORDS // 2)

        def multiply(sum_xt, half=half):
            for place, operand_xw in enumerate(operands):
                x_tw = refs.x_tiles.at[slot, place, :, pl.ds(half.start, WORDS // 2)]
                plgpu.wgmma(sum_xt, operand_xw[:, half], x_tw.transpose((1, 0)))
            return sum_xt[...]

        sum_xt = pl.run_scoped(multiply, plgpu.ACC((ROWS, sizes.t), jnp.float32))
        scale_x = load(refs.scale_tiles.at[slot, group, columns], L.WGMMA.reduce(1))
        total_xt = total_xt + sum_xt * lax.broadcast_in_dim(scale_x, sum_xt.shape, [0])
    plgpu.commit_smem()  # loads and TMA reach shared memory by two ways, which a fence puts in order
    plgpu.barrier_arrive(refs.free.at[slot])
    return total_xt


def numbers(words: jax.Array, place: int, dtype: jnp.dtype) -> jax.Array:
    """The 4-bit numbers at one place of the words."""
    bits, bias = BIAS[jnp.dtype(dtype).name]
    if place:
        words = lax.shift_right_logical(words, jnp.int16(4 * place))
    return lax.bitcast_convert_type((words & jnp.int16(15)) ^ jnp.int16(bits), dtype) - jnp.array(bias, dtype)
