"""The work list of a ragged step: which query tiles there are, and what each of them sees.

A row's tokens are cut into tiles of t tokens that begin at multiples of 8. Tiles of all rows form one list of
static size, longest first: rows in the order of their ends, and within a row the last tile first, since it sees the
most.

    rows      tokens 0..18        tokens 19..21     t = 8
    tiles     0-7 8-15 16-18      19-21, from 16    a tile may reach over both ends of its row, never of the step
    list      16- 8-15 0-7 19-21 - - -              (T + (t + 6) B) // t places; those past the last tile are dead

A tile near the end of the step begins earlier, so that all its t tokens are tokens of the step: low..high tells
which of them are its own.

Why multiples of 8: queries go to shared memory in boxes of 8 rows, and the copy engine counts those boxes from the
beginning of the step. What begins amid a box ends with it, and zeros follow, as an H200 showed.

Cost: up to 7 places of a row's first tile hold tokens of others. W x B and B x B comparisons in XLA, the same for
every layer with the same window, so a step makes them once.
Source: FlashAttention's longest-first order of tiles.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.rows import Rows, owners

BOX = 8  # rows


class Tiles(NamedTuple):
    """Columns of the list, int32 [W]; `total` alone counts the live ones, [1]."""

    row: jax.Array
    token: jax.Array  # index in T of its first token
    low: jax.Array  # its own tokens are low..high - 1
    high: jax.Array
    first: jax.Array  # first tile of positions
    count: jax.Array  # tiles of positions; 0 marks a dead place
    # Counted from the first position of that first tile:
    place: jax.Array  # the position of its first token; those before `low` may have negative ones
    begin: jax.Array  # the first position that any own token sees
    end: jax.Array  # the first position of the row that is not written
    total: jax.Array

    def packed(self) -> jax.Array:
        """[W, 9] for the kernel, which reads one line at a time."""
        return jnp.stack(self[:-1], axis=1)


class Order(NamedTuple):
    """Where the tiles of each row stand in the list."""

    tiles_B: jax.Array
    before_B: jax.Array  # tiles in the list before the row's


def order(rows: Rows, t: int) -> Order:
    """Rows with more written positions come first; equal ones in the order of the step."""
    tiles_B = jnp.where(rows.count_B > 0, lax.div(lax.rem(rows.first_B, BOX) + rows.count_B + (t - 1), t), 0)
    end_B = jnp.where(rows.count_B > 0, rows.start_B + rows.count_B, 0)
    index_B = jnp.arange(len(end_B))
    before_BB = (end_B > end_B[:, None]) | ((end_B == end_B[:, None]) & (index_B < index_B[:, None]))
    return Order(tiles_B, jnp.sum(jnp.where(before_BB, tiles_B, 0), axis=1, dtype=jnp.int32))


def list_tiles(rows: Rows, T: int, t: int, s: int, window: int | None) -> Tiles:
    """Query tiles of t tokens that meet tiles of s positions. T and t are multiples of 8, and T at least t."""
    tiles_B, before_B = order(rows, t)
    index_W = jnp.arange(min(T, (T + (t + BOX - 2) * len(tiles_B)) // t), dtype=jnp.int32)
    after_WB = index_W[:, None] - before_B
    mine_WB = (after_WB >= 0) & (after_WB < tiles_B)
    live_W = jnp.any(mine_WB, axis=1)
    row_W = jnp.argmax(mine_WB, axis=1).astype(jnp.int32)
    start_W, count_W, first_W = (part[row_W] for part in (rows.start_B, rows.count_B, rows.first_B))
    nth_W = tiles_B[row_W] - 1 - (index_W - before_B[row_W])
    own_W = first_W - lax.rem(first_W, BOX) + t * nth_W  # where it would begin in a longer step
    token_W = jnp.where(live_W, jnp.clip(own_W, 0, T - t), 0)
    position_W = start_W + token_W - first_W
    low_W = jnp.maximum(own_W, first_W) - token_W
    high_W = jnp.minimum(first_W + count_W - token_W, t)
    begin_W = jnp.zeros_like(low_W) if window is None else jnp.maximum(position_W + low_W - (window - 1), 0)
    first_tile_W = lax.div(begin_W, s)
    tiles_W = jnp.where(live_W, lax.div(position_W + high_W - 1, s) + 1 - first_tile_W, 0)
    seen_W = [at_W - s * first_tile_W for at_W in (position_W, begin_W, start_W + count_W)]
    columns = (row_W, token_W, low_W, high_W, first_tile_W, tiles_W, *seen_W)
    return Tiles(*columns, jnp.sum(tiles_B, keepdims=True, dtype=jnp.int32))


def places(rows: Rows, tiles: Tiles, T: int, t: int) -> tuple[jax.Array, jax.Array]:
    """For each token of the step the index of its tile in the list, and its place in that tile."""
    tiles_B, before_B = order(rows, t)
    row_T = owners(rows, T).row_T
    token_T = jnp.arange(T, dtype=jnp.int32)
    first_T = rows.first_B[row_T]
    back_T = tiles_B[row_T] - 1 - lax.div(token_T - first_T + lax.rem(first_T, BOX), t)
    tile_T = jnp.clip(before_B[row_T] + back_T, 0, len(tiles.token) - 1)
    return tile_T, jnp.clip(token_T - tiles.token[tile_T], 0, t - 1)
