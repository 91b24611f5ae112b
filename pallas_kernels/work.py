"""Who does what in a decode step: tiles of all rows dealt evenly to programs that run side by side.

Every row's visible tiles of 64 positions stand in one list, in order of rows. Program x takes the x-th equal
share of the list; where a share ends, or a row, the list is cut, and what lies between two cuts is an item:

    tiles      a a a a a b c c c c c c        3 rows of 5, 1 and 6 tiles, 3 programs: a share is 4
    programs   0-------|1-------|2-------
    items      0-------|1|2|3---|4-------     row a: items 0, 1; row b: 2; row c: 3, 4

so that every program has as much to read, whatever the lengths are. With `fixed` tiles an item instead, each row
is cut from its own first tile on, and an item is done whole by the program in whose share it begins: what a row
gives then depends on nothing but the row.

Cost: comparisons of rows with rows and of items with rows, in a few small XLA kernels, once a step for all layers.
Source: Stream-K's cut of the work, over positions; FlashInfer's plan apart from the run.
"""

from types import ModuleType
from typing import NamedTuple

import jax
import jax.numpy as jnp

TILE = 64  # positions
BEYOND = 2**31 - 1


class Work(NamedTuple):
    """The items of a step, int32: I of them, for X programs; those past the last live one have 0 tiles."""

    row_I: jax.Array
    first_I: jax.Array  # tile in the row
    count_I: jax.Array  # tiles
    bound_X: jax.Array  # the items of program x are bound_x..bound_(x + 1) - 1; one more than programs
    first_B: jax.Array  # the items of row b are first_b..first_b + items_b - 1
    items_B: jax.Array


def deal(
    lengths_B: jax.Array,
    *,
    window: int | None,
    programs: int,
    most_tiles: int,
    fixed: int | None = None,
    xp: ModuleType = jnp,
) -> Work:
    """Deal rows of `lengths_B` positions, of which the last `window` (or all) are visible.

    most_tiles  that a row can have
    fixed       tiles of an item; without it rows are cut where the shares of programs end
    xp          jax.numpy, or numpy
    """
    B = lengths_B.shape[0]
    skipped_B = xp.zeros_like(lengths_B) if window is None else xp.maximum(lengths_B - window, 0) // TILE
    tiles_B = -(-lengths_B // TILE) - skipped_B
    begin_B = before(tiles_B, xp)
    end_B = begin_B + tiles_B
    share = xp.maximum(-(-end_B[-1] // programs), 1)
    if fixed is None:
        size, cut_B = share, begin_B // share * share  # the row's first cut, at or before its first tile
        num_items = min(programs + B, B * most_tiles)
    else:
        size, cut_B = fixed, begin_B
        num_items = B * -(-most_tiles // fixed)
    items_B = -(-(end_B - cut_B) // size) * (tiles_B > 0)
    first_B = before(items_B, xp)
    last_B = first_B + items_B
    item_I = xp.arange(num_items)
    row_I = xp.minimum(xp.sum(last_B <= item_I[:, None], axis=1), B - 1)
    live_I = item_I < last_B[-1]
    cut_I = cut_B[row_I] + (item_I - first_B[row_I]) * size
    begin_I = xp.where(live_I, xp.maximum(cut_I, begin_B[row_I]), BEYOND)
    count_I = xp.where(live_I, xp.minimum(cut_I + size, end_B[row_I]) - begin_I, 0)
    first_I = xp.where(live_I, begin_I - begin_B[row_I] + skipped_B[row_I], 0)
    bound_X = xp.sum(begin_I < share * xp.arange(programs + 1)[:, None], axis=1)
    parts = (row_I, first_I, count_I, bound_X, first_B, items_B)
    return Work(*(part.astype(xp.int32) for part in parts))


def before(count_B: jax.Array, xp: ModuleType) -> jax.Array:
    """The sum of the counts of earlier rows: one reduction, where a running sum would be three kernels on a GPU."""
    row_B = xp.arange(count_B.shape[0])
    return xp.sum(xp.where(row_B < row_B[:, None], count_B, 0), axis=1)
