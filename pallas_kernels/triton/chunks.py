"""Attention of rows with any number of tokens, as a Pallas kernel through the Triton lowering, for NVIDIA GPUs.

Each row's tokens are cut into query tiles; one program serves one query tile and one kv head. The rows of its dots
are the tokens times the G query heads of the kv head, so that few tokens of many heads fill a tensor core too:

    row 0, tokens 4..9 of 10        positions  0..3  4..7  8..11          a tile of 4 tokens, 4 positions
        query tile 4..7                         |##|  |\\ |               ## without masks, \\ with
        query tile 8..9                         |##|  |##|  |\\

    list      (row, first token) of every query tile, those with the most positions first; its end is dead
    q_rh      r = token * G + head in the group, loaded from and stored to [T, N, H] row by row
    loops     window's edge (masked), inside (plain), diagonal (masked)

The list has room for the worst case, T / tokens + B tiles. Programs of dead entries end at once.

Cost: keys and values are read once for each query tile, 2 x 2 x tokens x N x H operations for each position.
Compiled ahead of time for an A100, H200, B200 and RTX PRO 6000, every head width and pool: 106 to 255 registers,
none spilled, 16 to 161 KiB of shared memory (64 to 97 for heads of 128).
The Triton lowering is deprecated since jax 0.11; this kernel is the one for GPUs that Mosaic does not serve.
Source: FlashAttention-2, ragged over blocks.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pl_triton

from pallas_kernels.pools import Pool, Scaled, geometry
from pallas_kernels.rows import Rows
from pallas_kernels.target import H200, Target
from pallas_kernels.triton import tiles
from pallas_kernels.triton.form import LOG2_E, Form, form_of, unserved
from pallas_kernels.triton.tiles import Running

__all__ = ["Config", "attend", "rule", "unserved"]

LESS_SHARED = (86, 89, 120, 121)  # 99 KiB of shared memory, not 163 or more


class Config(NamedTuple):
    """How the work is cut."""

    rows: int  # of a dot: tokens times query heads
    tile: int  # positions
    warps: int = 8
    stages: int = 2  # a tile is on its way while another is multiplied


class Work(NamedTuple):
    """The list of query tiles, each of some tokens of one row."""

    row_W: jax.Array  # -1 for dead entries
    within_W: jax.Array  # tokens of the row before the tile


def rule(target: Target, q_TNH: jax.Array, k: Pool, *, plain: bool) -> Config:
    """The config for these shapes: the longest tiles that no compiler was seen to spill registers for.

    plain says that there is neither a window nor a soft cap.
    """
    H, C = q_TNH.shape[-1], geometry(k)[2]
    scaled = isinstance(k, Scaled)
    match target.arch // 10:
        case 10:
            short = H <= 64 if scaled else H == 96
        case 9:
            short = H >= 128 and scaled
        case _:  # 8 and 12, whose tensor cores take operands from registers alone
            short = H in (80, 96) or (H >= 128 and (scaled or not plain)) or (H == 256 and C < 64)
            short |= H == 256 and target.arch in LESS_SHARED
    return Config(64 if H > 128 else 128, 32 if short else 64)


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
    config: Config | None = None,
    target: Target = H200,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Each token of a row sees the last `window` (or all) of the row's positions up to its own.

    Returns [T, N, H] and the log of the mass [T, N], both float32; what stands in the places of tokens that belong
    to no row is undefined. What `unserved` names is not to be asked for.
    """
    T, N, H = q_TNH.shape
    K = geometry(k)[1]
    config = config or rule(target, q_TNH, k, plain=window is None and soft_cap is None)
    form = form_of(q_TNH, k, rows=config.rows, tile=config.tile, scale=scale, window=window, soft_cap=soft_cap)
    work = list_work(rows, T, config.rows // form.group)
    operands = (q_TNH, k, v, rows, work, jnp.reshape(jnp.asarray(base, jnp.int32), (1,)), sinks_N)
    return tuple(
        pl.pallas_call(
            functools.partial(one_tile, form=form),
            grid=(K, work.row_W.shape[0]),
            out_shape=[jax.ShapeDtypeStruct((T, N, H), jnp.float32), jax.ShapeDtypeStruct((T, N), jnp.float32)],
            compiler_params=pl_triton.CompilerParams(num_warps=config.warps, num_stages=config.stages),
            interpret=interpret,
            name="triton_chunks",
        )(*operands)
    )


def list_work(rows: Rows, num_tokens: int, tokens: int) -> Work:
    """Cut each row into query tiles of so many tokens, listed from the row's end, which sees the most positions."""
    B = rows.count_B.shape[0]
    room = min(num_tokens, (num_tokens + B * (tokens - 1)) // tokens)
    end_B = jnp.cumsum(-(-rows.count_B // tokens))
    index_W = jnp.arange(room, dtype=jnp.int32)
    row_W = jnp.sum(end_B <= index_W[:, None], axis=1, dtype=jnp.int32)
    live_W = row_W < B
    row_W = jnp.minimum(row_W, B - 1)
    return Work(jnp.where(live_W, row_W, -1), tokens * (end_B[row_W] - 1 - index_W))


def one_tile(q_ref, k, v, rows, work, base_ref, sinks_ref, o_ref, lse_ref, *, form: Form):
    """One program: a query tile, for the query heads of one kv head."""
    head, item = pl.program_id(0), pl.program_id(1)
    row = work.row_W[item]

    @pl.when(row >= 0)
    def _():
        within = work.within_W[item]
        outputs = live_tile(q_ref, k, v, rows, base_ref[0], sinks_ref, row, within, head, form)
        store(o_ref, lse_ref, *outputs, form)


def live_tile(q_ref, k, v, rows, base, sinks_ref, row, within, head, form: Form):
    """The query tile of `row` that begins after `within` of its tokens: its state, and where its rows belong."""
    s, tokens = jnp.int32(form.tile), form.rows // form.group
    count = jnp.minimum(rows.count_B[row] - within, tokens)
    begin = rows.start_B[row] + within  # the position of the tile's first token
    end = begin + count
    first_seen = jnp.int32(0) if form.window is None else jnp.maximum(begin - (form.window - 1), 0)

    row_r = jnp.arange(form.rows, dtype=jnp.int32)
    token_r = lax.div(row_r, jnp.int32(form.group))
    head_r = head * form.group + lax.rem(row_r, jnp.int32(form.group))
    live_r = token_r < count
    position_r = begin + token_r
    token_r = jnp.where(live_r, rows.first_B[row] + within + token_r, q_ref.shape[0])  # past the end: never stored
    heads = tiles.load_heads(q_ref, k, v, head, token_r, head_r, live_r, form)

    def plain(at, state):
        place = tiles.find(rows.table_BM, base, row, at, form, None)
        return tiles.meet(state, heads, place, None, form)

    def masked(at, state):
        place = tiles.find(rows.table_BM, base, row, at, form, (first_seen, end))
        position_s = at * s + jnp.arange(form.tile, dtype=jnp.int32)
        seen_rs = position_s[None] <= position_r[:, None]
        if form.window is not None:
            seen_rs &= position_s[None] > position_r[:, None] - form.window
        return tiles.meet(state, heads, place, seen_rs, form)

    sink_r = None
    if sinks_ref is not None:
        sink_r = pl_triton.load(sinks_ref.at[head_r], mask=live_r, other=0.0) * (LOG2_E / form.unit)
    state = tiles.nothing_yet(form, sink_r)
    inside = lax.div(first_seen, s)
    past = lax.div(end + (s - 1), s)
    if form.window is not None:
        edge, inside = inside, lax.div(jnp.maximum(end - form.window, 0) + (s - 1), s)
        inside = jnp.minimum(inside, past)  # the first tile whose every position the last token sees
        state = lax.fori_loop(edge, inside, masked, state)
    diagonal = jnp.maximum(lax.div(begin + 1, s), inside)  # the first tile that the first token does not see whole
    state = lax.fori_loop(inside, diagonal, plain, state)
    return lax.fori_loop(diagonal, past, masked, state), token_r, head_r, live_r


def store(o_ref, lse_ref, state: Running, token_r, head_r, live_r, form: Form):
    """Write the outputs of live rows."""
    for total_rh, (where, mask) in zip(state.totals_rh, tiles.indices(token_r, head_r, live_r, form), strict=True):
        pl_triton.store(o_ref.at[where], total_rh / state.mass_r[:, None], mask=mask)
    lse_r = state.top_r * (form.unit / LOG2_E) + jnp.log(state.mass_r)
    pl_triton.store(lse_ref.at[token_r, head_r], lse_r, mask=live_r)
