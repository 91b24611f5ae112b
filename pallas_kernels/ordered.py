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

from pallas_kernels.numerics import tree_sum
from pallas_kernels.pools import as_numbers
from pallas_kernels.rows import Rows

QUERY_TILE = 8
TILE = 64
NOTHING = -1e30


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


def attention(
    q_TNH: jax.Array,
    k_PKCH: jax.Array,
    v_PKCH: jax.Array,
    rows: Rows,
    *,
    base: int | jax.Array,
    scale: float,
    window: int | None,
) -> jax.Array:
    """Equals `reference.attention` up to the order of its sums.

    Raises ValueError when 64 positions are neither a multiple nor a divisor of a block.
    """
    T, N, H = q_TNH.shape
    _, K, C, _ = k_PKCH.shape
    if TILE % C and C % TILE:
        raise ValueError(f"positions in a block: got {C}; expected a divisor or a multiple of {TILE}")
    t = QUERY_TILE
    q_NTH = jnp.pad((q_TNH.astype(jnp.float32) * scale).swapaxes(0, 1), ((0, 0), (t, t), (0, 0)))
    table_BM = jnp.pad(rows.table_BM + base, ((0, 0), (0, -rows.table_BM.shape[1] % max(1, TILE // C))))
    ends = rows.start_B + rows.count_B
    tiles_B = jnp.where(rows.count_B > 0, -(-ends // t) - rows.start_B // t, 0)
    end_B = jnp.cumsum(tiles_B)

    def one(carry):
        index, o_NTH = carry
        head = index % N
        at = locate(rows, end_B, tiles_B, index // N)
        q_tH = lax.dynamic_slice(q_NTH, (head, at.token, 0), (1, t, H))[0]

        def meet_tile(tile, state):
            pools = (take_tile(pool, table_BM, at.row, tile, head // (N // K)) for pool in (k_PKCH, v_PKCH))
            return meet(state, q_tH, *pools, see(at, tile, window), tile * TILE + jnp.arange(TILE) < at.end)

        last = jnp.max(jnp.where(at.mine_t, at.position_t, 0))
        begin = jnp.int32(0) if window is None else jnp.maximum(at.position_t[0] - window + 1, 0) // TILE
        nothing = Running(jnp.zeros((t, H)), jnp.full(t, NOTHING), jnp.zeros(t))
        state = lax.fori_loop(begin, last // TILE + 1, meet_tile, nothing)
        o_tH = state.total_tH / jnp.where(state.mass_t > 0, state.mass_t, 1)[:, None]
        old_tH = lax.dynamic_slice(o_NTH, (head, at.token, 0), (1, t, H))[0]
        o_tH = jnp.where(at.mine_t[:, None], o_tH, old_tH)
        return index + 1, lax.dynamic_update_slice(o_NTH, o_tH[None], (head, at.token, 0))

    _, o_NTH = lax.while_loop(lambda carry: carry[0] < end_B[-1] * N, one, (jnp.int32(0), jnp.zeros_like(q_NTH)))
    return o_NTH[:, t : t + T].swapaxes(0, 1).astype(q_TNH.dtype)


def locate(rows: Rows, end_B: jax.Array, tiles_B: jax.Array, index: jax.Array) -> Where:
    """The row and the places of query tile `index` of the step."""
    row = jnp.sum(end_B <= index).astype(jnp.int32)
    start, count = rows.start_B[row], rows.count_B[row]
    first = (start // QUERY_TILE + index - (end_B[row] - tiles_B[row])) * QUERY_TILE
    position_t = first + jnp.arange(QUERY_TILE, dtype=jnp.int32)
    mine_t = (position_t >= start) & (position_t < start + count)
    return Where(row, rows.first_B[row] + first - start + QUERY_TILE, position_t, mine_t, start + count)


def take_tile(pool_PKCH: jax.Array, table_BM: jax.Array, row: jax.Array, tile: jax.Array, head: jax.Array):
    """[64, H] in float32: the keys or values of one kv head at positions 64 * tile and on."""
    _, _, C, H = pool_PKCH.shape
    if C > TILE:
        block = table_BM[row, tile * TILE // C]
        x_KCH = lax.dynamic_slice(pool_PKCH, (block, head, tile * TILE % C, 0), (1, 1, TILE, H))
    else:
        m = TILE // C
        blocks_m = lax.dynamic_slice(table_BM, (row, tile * m), (1, m))[0]
        x_KCH = pool_PKCH[blocks_m, head]
    return as_numbers(x_KCH.reshape(TILE, H)).astype(jnp.float32)


def see(at: Where, tile: jax.Array, window: int | None) -> jax.Array:
    """[8, 64]: which positions of a tile each token sees."""
    position_s = tile * TILE + jnp.arange(TILE, dtype=jnp.int32)
    seen_ts = at.mine_t[:, None] & (position_s <= at.position_t[:, None])
    return seen_ts if window is None else seen_ts & (position_s > at.position_t[:, None] - window)


def meet(
    state: Running, q_tH: jax.Array, k_sH: jax.Array, v_sH: jax.Array, seen_ts: jax.Array, written_s: jax.Array
) -> Running:
    """Add one tile of positions; unwritten places may hold NaN, and 0 * NaN is NaN."""
    scores_ts = lax.dot_general(q_tH, k_sH, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    scores_ts = jnp.where(seen_ts, scores_ts, NOTHING)
    top_t = jnp.maximum(state.top_t, jnp.max(scores_ts, axis=1))
    keep_t = jnp.exp(state.top_t - top_t)
    weights_ts = jnp.where(seen_ts, jnp.exp(scores_ts - top_t[:, None]), 0)
    v_sH = jnp.where(written_s[:, None], v_sH, 0)
    added_tH = lax.dot_general(weights_ts, v_sH, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)
    return Running(state.total_tH * keep_t[:, None] + added_tH, top_t, state.mass_t * keep_t + tree_sum(weights_ts))
