"""Attention of rows with one token each, as a Pallas kernel through the Triton lowering, for NVIDIA GPUs.

One program serves one row, one kv head and one split of the row's tiles; its G query heads are the rows of
both dots, padded in registers to the 16 that a tensor core wants:

    grid (B, K, splits)   q_gH [16, H] . k_sH^T [H, s] -> softmax over s so far -> . v_sH [s, H]
    afterwards            `merge` joins the splits of a row by log-sum-exp, with the sink as one more

Each row's own tiles are dealt evenly to its splits, and there are only as many splits as it takes to give
every multiprocessor a few programs, since each writes a partial result. Programs without tiles end at once.

Cost: keys and values once, and splits x G x H float32 for each row and kv head. Compiled ahead of time for an A100,
H200, B200 and RTX PRO 6000, every head width and pool: 56 to 168 registers, none spilled, 8 to 96 KiB of shared
memory (38 for heads of 128).
The Triton lowering is deprecated since jax 0.11; this kernel is the one for GPUs that Mosaic does not serve.
Source: FlashDecoding.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pl_triton

from pallas_kernels.pools import Pool, geometry
from pallas_kernels.target import H200, Target
from pallas_kernels.triton import tiles
from pallas_kernels.triton.form import MIN_DOT, Form, form_of, unserved
from pallas_kernels.triton.merge import merge

__all__ = ["Config", "attend", "rule", "unserved"]

PROGRAMS_OF_A_CORE = 4


class Config(NamedTuple):
    """How the work is cut."""

    tile: int  # positions
    splits: int
    warps: int = 4
    stages: int = 3  # a tile is on its way, and the number of the next one's block, while another is multiplied


def rule(target: Target, q_BNH: jax.Array, k: Pool, columns: int) -> Config:
    """The config for these shapes; columns are those of the table."""
    B, N, H = q_BNH.shape
    _, K, C, _ = geometry(k)
    tile = 64 if H <= 128 else 32  # keys, values and sums must fit the registers
    splits = min(-(-PROGRAMS_OF_A_CORE * target.cores // (B * K)), -(-columns * C // tile))
    return Config(tile, max(1, splits), warps=4 if N // K <= 32 else 8)


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
    soft_cap: float | None = None,
    sinks_N: jax.Array | None = None,
    config: Config | None = None,
    target: Target = H200,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Row b attends to the last `window` (or all) of its positions 0..lengths_b - 1; length 0 gives 0.

    Returns [B, N, H] and the log of the mass [B, N], both float32. What `unserved` names is not to be asked for.
    """
    B, N, H = q_BNH.shape
    K = geometry(k)[1]
    config = config or rule(target, q_BNH, k, table_BM.shape[1])
    rows = max(MIN_DOT, pl.next_power_of_2(N // K))
    form = form_of(q_BNH, k, rows=rows, tile=config.tile, scale=scale, window=window, soft_cap=soft_cap)
    parts = (config.splits, B, N)
    totals, tops, masses = pl.pallas_call(
        functools.partial(one_split, form=form, splits=config.splits),
        grid=(B, K, config.splits),
        out_shape=[jax.ShapeDtypeStruct(part, jnp.float32) for part in ((*parts, H), parts, parts)],
        compiler_params=pl_triton.CompilerParams(num_warps=config.warps, num_stages=config.stages),
        interpret=interpret,
        name="triton_decode",
    )(q_BNH, k, v, table_BM, lengths_B, jnp.reshape(jnp.asarray(base, jnp.int32), (1,)))
    return merge(totals, tops, masses, sinks_N, lengths_B, unit=form.unit, interpret=interpret)


def one_split(
    q_ref, k, v, table_ref, lengths_ref, base_ref, total_ref, top_ref, mass_ref, *, form: Form, splits: int
):
    """One program: a share of one row's tiles, for the query heads of one kv head."""
    row, head, split = (pl.program_id(axis) for axis in range(3))
    base, length = base_ref[0], lengths_ref[row]
    first_seen = jnp.int32(0) if form.window is None else jnp.maximum(length - form.window, 0)
    first = lax.div(first_seen, jnp.int32(form.tile))
    count = lax.div(length + (form.tile - 1), jnp.int32(form.tile)) - first
    share = lax.div(count + (splits - 1), jnp.int32(splits))
    begin = first + jnp.minimum(split * share, count)
    end = first + jnp.minimum((split + 1) * share, count)
    in_group_g = jnp.arange(form.rows, dtype=jnp.int32)
    live_g = in_group_g < form.group
    head_g = jnp.where(live_g, head * form.group + in_group_g, q_ref.shape[1])  # past the end: never stored
    heads = tiles.load_heads(q_ref, k, v, head, row, head_g, live_g, form)

    def step(at, state):
        place = tiles.find(table_ref, base, row, at, form, (first_seen, length))
        return tiles.meet(state, heads, place, place.read_s[None], form)

    state = lax.fori_loop(begin, end, step, tiles.nothing_yet(form))
    for total_gh, (where, mask) in zip(state.totals_rh, tiles.indices(row, head_g, live_g, form), strict=True):
        pl_triton.store(total_ref.at[split, *where], total_gh, mask=mask)
    pl_triton.store(top_ref.at[split, row, head_g], state.top_r, mask=live_g)
    pl_triton.store(mass_ref.at[split, row, head_g], state.mass_r, mask=live_g)
