"""Attention whose bits depend on nothing but the sequence, in XLA: the `invariant` mode.

What a token gets is the same however its prompt was cut into chunks, whatever rows share the step, wherever
its blocks lie, however many heads are local and however many positions a block has, because

1. every dot has one shape, [8, H] x [H, 64] or [8, 64] x [64, H], for one row and one query head, and stands
   in a loop whose body is the same for any number of rows, heads and blocks;
2. query tiles and tiles of positions are aligned to multiples of 8 and of 64 in the sequence, so a token has
   the same place in its tile whether it comes in a chunk or alone;
3. tiles are visited in order, and sums over positions within a tile are halving trees;
4. a tile that a token cannot see leaves its state as it was: times exp(0), plus 0.

    sequence  0........63 64.......127 128
    chunk of tokens 60..67: query tiles 56..63 (4 of 8 places filled) and 64..71 (4 of 8)

Cost: rows x heads x query tiles x tiles of positions, each some 10 microseconds on CPU; a decode step fills
one place in eight. Equality holds within one backend, jaxlib and device kind.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.numerics import NOTHING, tree_sum
from pallas_kernels.pools import Pool, Scaled, as_numbers, geometry
from pallas_kernels.rows import Rows
from pallas_kernels.xla.softmax import cap, finish, product

QUERY_TILE = 8
TILE = 64


class Running(NamedTuple):
    """Softmax so far of one query tile and one query head."""

    total_tH: jax.Array
    top_t: jax.Array
    mass_t: jax.Array


class Where(NamedTuple):
    """The place of one query tile."""

    row: jax.Array
    token: jax.Array  # index in T, padded by one query tile in front, of the tile's first place
    position_t: jax.Array
    mine_t: jax.Array  # places filled by tokens of the row in this step
    end: jax.Array  # positions of the row that are written


def attend(
    q_TNH: jax.Array,
    k: Pool,
    v: Pool,
    rows: Rows,
    *,
    base: int | jax.Array,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    sinks_N: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """Equals `reference.attend` up to the order of its sums; float32.

    Raises ValueError when 64 positions are neither a multiple nor a divisor of a block.
    """
    T, N, H = q_TNH.shape
    _, K, C, _ = geometry(k)
    if TILE % C and C % TILE:
        raise ValueError(f"positions in a block: got {C}; expected a divisor or a multiple of {TILE}")
    t = QUERY_TILE
    q_NTH = jnp.pad((q_TNH.astype(jnp.float32) * scale).swapaxes(0, 1), ((0, 0), (t, t), (0, 0)))
    table_BM = jnp.pad(rows.table_BM + base, ((0, 0), (0, -rows.table_BM.shape[1] % max(1, TILE // C))))
    ends = rows.start_B + rows.count_B
    tiles_B = jnp.where(rows.count_B > 0, -(-ends // t) - rows.start_B // t, 0)
    end_B = jnp.cumsum(tiles_B)

    def one(carry):
        index, o_NTH, lse_NT = carry
        head = index % N
        at = locate(rows, end_B, tiles_B, index // N)
        q_tH = lax.dynamic_slice(q_NTH, (head, at.token, 0), (1, t, H))[0]

        def meet_tile(tile, state):
            here = Tile(table_BM, C, at.row, tile, head // (N // K))
            return meet(state, q_tH, here.keys(k), here.values(v), see(at, tile, window), soft_cap)

        last = jnp.max(jnp.where(at.mine_t, at.position_t, 0))
        begin = jnp.int32(0) if window is None else jnp.maximum(at.position_t[0] - window + 1, 0) // TILE
        nothing = Running(jnp.zeros((t, H)), jnp.full(t, NOTHING), jnp.zeros(t))
        state = lax.fori_loop(begin, last // TILE + 1, meet_tile, nothing)
        sink = None if sinks_N is None else lax.dynamic_index_in_dim(sinks_N, head)
        o_t1H, lse_t1 = finish(state.total_tH[:, None], state.top_t[:, None], state.mass_t[:, None], sink)
        o_NTH = put(o_NTH, head, at, o_t1H[:, 0])
        return index + 1, o_NTH, put(lse_NT[..., None], head, at, lse_t1)[..., 0]

    first = (jnp.int32(0), jnp.zeros_like(q_NTH), jnp.full(q_NTH.shape[:2], -jnp.inf))
    _, o_NTH, lse_NT = lax.while_loop(lambda carry: carry[0] < end_B[-1] * N, one, first)
    return o_NTH[:, t : t + T].swapaxes(0, 1), lse_NT[:, t : t + T].T


def put(x_NTX: jax.Array, head: jax.Array, at: Where, x_tX: jax.Array) -> jax.Array:
    """One query tile's results in their places; places of others in the tile stay as they are."""
    place = (head, at.token, 0)
    old_tX = lax.dynamic_slice(x_NTX, place, (1, *x_tX.shape))[0]
    return lax.dynamic_update_slice(x_NTX, jnp.where(at.mine_t[:, None], x_tX, old_tX)[None], place)


def locate(rows: Rows, end_B: jax.Array, tiles_B: jax.Array, index: jax.Array) -> Where:
    """The row and the places of query tile `index` of the step."""
    row = jnp.sum(end_B <= index).astype(jnp.int32)
    start, count = rows.start_B[row], rows.count_B[row]
    first = (start // QUERY_TILE + index - (end_B[row] - tiles_B[row])) * QUERY_TILE
    position_t = first + jnp.arange(QUERY_TILE, dtype=jnp.int32)
    mine_t = (position_t >= start) & (position_t < start + count)
    return Where(row, rows.first_B[row] + first - start + QUERY_TILE, position_t, mine_t, start + count)


class Tile(NamedTuple):
    """64 positions of one kv head."""

    table_BM: jax.Array
    block: int  # positions in a block
    row: jax.Array
    number: jax.Array
    head: jax.Array

    def cut(self, array: jax.Array, axis: int = 2) -> jax.Array:
        """Its part of an array [P, K, ...] whose axis `axis` is C: [m, ...], m blocks or one part of a block."""
        if self.block <= TILE:
            m = TILE // self.block
            return array[lax.dynamic_slice(self.table_BM, (self.row, self.number * m), (1, m))[0], self.head]
        place = [self.table_BM[self.row, self.number * TILE // self.block], self.head, 0, 0][: array.ndim]
        sizes = [1, 1, *array.shape[2:]]
        place[axis], sizes[axis] = self.number * TILE % self.block, TILE
        return lax.dynamic_slice(array, place, sizes)[:, 0]

    def keys(self, k: Pool) -> jax.Array:
        """[64, H] in float32."""
        if isinstance(k, Scaled):
            x_mCH = self.cut(k.numbers).astype(jnp.float32) * self.cut(k.scales_PKC)[..., None]
        else:
            x_mCH = as_numbers(self.cut(k)).astype(jnp.float32)
        return x_mCH.reshape(TILE, -1)

    def values(self, v: Pool) -> jax.Array:
        """[64, H] in float32."""
        if not isinstance(v, Scaled):
            return self.keys(v)
        x_mHC = self.cut(v.numbers, axis=3).astype(jnp.float32) * self.cut(v.scales_PKC)[:, None]
        return x_mHC.swapaxes(1, 2).reshape(TILE, -1)


def see(at: Where, tile: jax.Array, window: int | None) -> jax.Array:
    """[8, 64]: which positions of a tile each token sees."""
    position_s = tile * TILE + jnp.arange(TILE, dtype=jnp.int32)
    seen_ts = at.mine_t[:, None] & (position_s <= at.position_t[:, None])
    return seen_ts if window is None else seen_ts & (position_s > at.position_t[:, None] - window)


def meet(
    state: Running,
    q_tH: jax.Array,
    k_sH: jax.Array,
    v_sH: jax.Array,
    seen_ts: jax.Array,
    soft_cap: float | None,
) -> Running:
    """Add one tile of positions; what nobody sees may be NaN, and 0 * NaN is NaN."""
    scores_ts = jnp.where(seen_ts, cap(product("tH,sH->ts", q_tH, k_sH), soft_cap), NOTHING)
    top_t = jnp.maximum(state.top_t, jnp.max(scores_ts, axis=1))
    keep_t = jnp.exp(state.top_t - top_t)
    weights_ts = jnp.where(seen_ts, jnp.exp(scores_ts - top_t[:, None]), 0)
    v_sH = jnp.where(jnp.any(seen_ts, axis=0)[:, None], v_sH, 0)
    added_tH = product("ts,sH->tH", weights_ts, v_sH)
    return Running(state.total_tH * keep_t[:, None] + added_tH, top_t, state.mass_t * keep_t + tree_sum(weights_ts))
