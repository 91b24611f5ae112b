"""Attention of rows with one token each, in XLA: work follows the sum of the lengths, not the table or the pool.

Every row's visible positions are cut into tiles of s positions (m blocks). The tiles of all rows form one
list, and a loop takes W of them at a time, whatever rows they belong to:

    row 0 |####|##--|          list   0.0 0.1 | 1.0 1.1 | 1.2 2.0 |      (W = 2)
    row 1 |####|####|#---|     each   scores -> softmax of the tile alone -> weighted sum of values
    row 2 |##--|               then   merged into the row's running (top, mass, total) by log-sum-exp

The rows of a group stand side by side in the list, so their running state is one slice of W places.

Cost: the keys and values of the tiles are copied once out of the pools and multiplied once, and each group
takes some 25 microseconds more. On CPU that is 3 to 4 times the time of reading them with one core, for heads of
128; a group holds about 1 MiB of keys, since smaller ones pay for their number and larger ones for the cache.
Source: FlashDecoding (split over positions, merge by log-sum-exp), as a work list.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.numerics import NOTHING
from pallas_kernels.pools import Pool, geometry, keys_at, values_at
from pallas_kernels.xla.softmax import cap, finish, product

TILE = 64  # positions, unless a block is longer
GROUP_BYTES = 1 << 20
MAX_GROUP = 16


class Tiles(NamedTuple):
    """The list of tiles of all rows."""

    end_B: jax.Array  # tiles of rows 0..b together
    begin_B: jax.Array  # the row's first tile in the list
    skipped_B: jax.Array  # tiles before the window
    place_B: jax.Array  # rows that have tiles, numbered without gaps
    lengths_B: jax.Array
    blocks_BM: jax.Array  # block indices in the whole pool, padded to whole tiles


class Group(NamedTuple):
    """W tiles of the list."""

    row_W: jax.Array
    place_W: jax.Array
    live_W: jax.Array  # false past the end of the list
    blocks_w: jax.Array  # w = W * m
    positions_Ws: jax.Array


class Partial(NamedTuple):
    """Attention over some positions, not yet divided by its mass."""

    total_WKGH: jax.Array
    top_WKG: jax.Array
    mass_WKG: jax.Array


def attend(
    q_BNH: jax.Array,
    k: Pool,
    v: Pool,
    table_BM: jax.Array,
    lengths_B: jax.Array,
    *,
    base: int | jax.Array,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    sinks_N: jax.Array | None,
    platform: str,
) -> tuple[jax.Array, jax.Array]:
    """Row b attends to the last `window` (or all) of its positions 0..lengths_b - 1; length 0 gives 0 and -inf.

    Returns outputs [B, N, H] and the log of each softmax's mass [B, N], in float32.
    """
    B, N, H = q_BNH.shape
    _, K, C, _ = geometry(k)
    m = max(1, TILE // C)
    W = group_size(B * -(-table_BM.shape[1] // m), m * K * C * H * jax.tree.leaves(k)[0].dtype.itemsize)
    q_BKGH = (q_BNH.astype(jnp.float32) * scale).reshape(B, K, N // K, H)
    tiles = list_tiles(table_BM + base, lengths_B, window, m, C)

    def step(carry):
        first, state = carry
        group = take(tiles, first, W, m, C)
        seen_Ws = group.positions_Ws < tiles.lengths_B[group.row_W][:, None]
        if window is not None:
            seen_Ws &= group.positions_Ws >= (tiles.lengths_B[group.row_W] - window)[:, None]
        seen_Ws &= group.live_W[:, None]
        scores_wKGC = scores_of(q_BKGH[group.row_W], keys_at(k, group.blocks_w), platform)
        part = weigh(cap(scores_wKGC, soft_cap), values_at(v, group.blocks_w), seen_Ws, platform)
        return first + W, merge(state, part, group)

    places = B + W
    empty = Partial(
        jnp.zeros((places, K, N // K, H)), jnp.full((places, K, N // K), NOTHING), jnp.zeros((places, K, N // K))
    )
    _, state = lax.while_loop(lambda carry: carry[0] < tiles.end_B[-1], step, (jnp.int32(0), empty))
    state = Partial(*(array[tiles.place_B] for array in state))
    o_BNH, lse_BN = finish(
        state.total_WKGH.reshape(B, N, H), state.top_WKG.reshape(B, N), state.mass_WKG.reshape(B, N), sinks_N
    )
    live_B = lengths_B > 0
    return jnp.where(live_B[:, None, None], o_BNH, 0), jnp.where(live_B[:, None], lse_BN, -jnp.inf)


def group_size(max_tiles: int, tile_bytes: int) -> int:
    """How many tiles a group holds: about GROUP_BYTES of keys, never more than there can be."""
    return max(1, min(GROUP_BYTES // tile_bytes, MAX_GROUP, max_tiles))


def list_tiles(blocks_BM: jax.Array, lengths_B: jax.Array, window: int | None, m: int, C: int) -> Tiles:
    """Cut each row's visible positions into tiles of m blocks of C positions."""
    s = m * C
    blocks_BM = jnp.pad(blocks_BM, ((0, 0), (0, -blocks_BM.shape[1] % m)))
    skipped_B = jnp.zeros_like(lengths_B) if window is None else jnp.maximum(lengths_B - window, 0) // s
    count_B = -(-lengths_B // s) - skipped_B
    end_B = jnp.cumsum(count_B)
    return Tiles(end_B, end_B - count_B, skipped_B, jnp.cumsum(count_B > 0) - 1, lengths_B, blocks_BM)


def take(tiles: Tiles, first: jax.Array, W: int, m: int, C: int) -> Group:
    """Tiles first..first + W - 1 of the list; those past its end are dead and read block 0."""
    index_W = first + jnp.arange(W, dtype=jnp.int32)
    live_W = index_W < tiles.end_B[-1]
    last = tiles.end_B.shape[0] - 1
    row_W = jnp.minimum(jnp.sum(tiles.end_B <= index_W[:, None], axis=1), last).astype(jnp.int32)
    tile_W = jnp.where(live_W, index_W - tiles.begin_B[row_W] + tiles.skipped_B[row_W], 0)
    blocks_Wm = tiles.blocks_BM[row_W[:, None], tile_W[:, None] * m + jnp.arange(m)]
    blocks_Wm = jnp.where(live_W[:, None], blocks_Wm, 0)
    positions_Ws = tile_W[:, None] * (m * C) + jnp.arange(m * C)
    return Group(row_W, tiles.place_B[row_W], live_W, blocks_Wm.reshape(-1), positions_Ws)


def scores_of(q_WKGH: jax.Array, k_wKCH: jax.Array, platform: str) -> jax.Array:
    """[w, K, G, C].

    Blocks are an axis of the batch and keys the left operand: with the blocks of a tile joined to C, or with
    queries on the left, XLA on CPU transposes the keys before it multiplies.
    """
    wide = jnp.float32 if platform == "cpu" else k_wKCH.dtype  # narrow dots need instructions a CPU may lack
    q_wKGH = jnp.repeat(q_WKGH.astype(wide), k_wKCH.shape[0] // q_WKGH.shape[0], axis=0)
    return product("wKCH,wKGH->wKCG", k_wKCH.astype(wide), q_wKGH).swapaxes(-1, -2)


def weigh(scores_wKGC: jax.Array, v_wKCH: jax.Array, seen_Ws: jax.Array, platform: str) -> Partial:
    """Softmax of each tile alone, and its sum of values."""
    w, K, G, C = scores_wKGC.shape
    tiles = (seen_Ws.shape[0], w // seen_Ws.shape[0])
    seen_wC = seen_Ws.reshape(w, C)
    seen_wKGC = seen_wC[:, None, None]
    scores_wKGC = jnp.where(seen_wKGC, scores_wKGC, NOTHING)
    top_WKG = jnp.max(jnp.max(scores_wKGC, axis=-1).reshape(*tiles, K, G), axis=1)
    top_wKG = jnp.repeat(top_WKG, tiles[1], axis=0)
    weights_wKGC = jnp.where(seen_wKGC, jnp.exp(scores_wKGC - top_wKG[..., None]), 0)
    # Where nothing was written there may be NaN, and 0 * NaN is NaN.
    v_wKCH = jnp.where(seen_wC[:, None, :, None], v_wKCH, 0)
    wide = jnp.float32 if platform == "cpu" else v_wKCH.dtype
    total_wKGH = product("wKGC,wKCH->wKGH", weights_wKGC.astype(wide), v_wKCH.astype(wide))
    mass_wKG = jnp.sum(weights_wKGC, axis=-1)
    return Partial(
        jnp.sum(total_wKGH.reshape(*tiles, K, G, -1), axis=1),
        top_WKG,
        jnp.sum(mass_wKG.reshape(*tiles, K, G), axis=1),
    )


def merge(state: Partial, part: Partial, group: Group) -> Partial:
    """Add a group's tiles to the running state of their rows.

    The group's rows have neighbouring places, so W places from that of its first tile hold them all.
    """
    W = group.place_W.shape[0]
    first = group.place_W[0]
    old = Partial(*(lax.dynamic_slice_in_dim(array, first, W) for array in state))
    mine_xW = (group.place_W - first == jnp.arange(W)[:, None]) & group.live_W  # x: the W places
    mine_xWKG = mine_xW[:, :, None, None]
    top_xKG = jnp.maximum(old.top_WKG, jnp.max(jnp.where(mine_xWKG, part.top_WKG, NOTHING), axis=1))
    keep_xKG = jnp.exp(old.top_WKG - top_xKG)
    share_xWKG = jnp.where(mine_xWKG, jnp.exp(part.top_WKG - top_xKG[:, None]), 0)
    total_xKGH = product("xWKG,WKGH->xKGH", share_xWKG, part.total_WKGH)
    new = Partial(
        old.total_WKGH * keep_xKG[..., None] + total_xKGH,
        top_xKG,
        old.mass_WKG * keep_xKG + jnp.sum(share_xWKG * part.mass_WKG, axis=1),
    )
    return Partial(
        *(lax.dynamic_update_slice_in_dim(array, piece, first, 0) for array, piece in zip(state, new, strict=True))
    )
