"""Attention of rows with one token each, as a Pallas kernel through the Triton lowering, for NVIDIA GPUs.

One program serves one row, one kv head and one split of the row's tiles; its G query heads are the rows of
both dots, padded to the 16 that a tensor core wants:

    grid (B, K, splits)   q_gH [16, H] . k_sH^T [H, s] -> softmax over s so far -> . v_sH [s, H]
    afterwards in XLA     the splits of a row merge by log-sum-exp

A tile is s positions, each found through its own table entry, so a tile may span blocks or be part of one.
Each row's own tiles are dealt evenly to its splits, and there are only as many splits as it takes to give
every multiprocessor a few programs, since each writes a partial result. Programs without tiles end at once.

Cost: keys and values once, and splits x G x H float32 for each row and kv head. Compiled ahead of time for an
H200 and an A100 it takes 80 to 154 registers and spills none, head widths 64 to 256.
The Triton lowering is deprecated since jax 0.11; this kernel is the one for GPUs that Mosaic does not serve.
Source: FlashDecoding.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pl_triton

NOTHING = -1e30
LOG2_E = math.log2(math.e)
MIN_DOT = 16  # rows of the smallest tensor core product
PROGRAMS = 512  # about four for each multiprocessor of a large GPU
HEAD_WIDTHS = (32, 64, 128, 256)


class Shape(NamedTuple):
    """What a kernel is compiled for."""

    padded: int  # query heads of a program, at least MIN_DOT
    block: int
    columns: int  # of the table
    tile: int
    splits: int
    window: int | None


def attend(
    q_BNH: jax.Array,
    k_PKCH: jax.Array,
    v_PKCH: jax.Array,
    table_BM: jax.Array,
    lengths_B: jax.Array,
    *,
    base: int | jax.Array,
    scale: float,
    window: int | None,
    interpret: bool = False,
) -> jax.Array:
    """Row b attends to the last `window` (or all) of its positions 0..lengths_b - 1; length 0 gives 0.

    Returns [B, N, H] in float32.
    Raises ValueError for a head width or block that is no power of two; `dispatch.choose` sends those elsewhere.
    """
    B, N, H = q_BNH.shape
    _, K, C, _ = k_PKCH.shape
    if H not in HEAD_WIDTHS or C & (C - 1):
        raise ValueError(f"head width and block: got {H} and {C}; expected one of {HEAD_WIDTHS} and a power of two")
    G = N // K
    M = table_BM.shape[1]
    # A tile of keys, values and sums must fit the registers: 64 positions of 128 two-byte numbers do.
    tile = 64 if H * k_PKCH.dtype.itemsize <= 256 else 32
    splits = max(1, min(-(-PROGRAMS // (B * K)), -(-M * C // tile)))
    shape = Shape(max(MIN_DOT, pl.next_power_of_2(G)), C, M, tile, splits, window)
    q_BKGH = (q_BNH.astype(jnp.float32) * (scale * LOG2_E)).astype(k_PKCH.dtype).reshape(B, K, G, H)
    q_BKGH = jnp.pad(q_BKGH, ((0, 0), (0, 0), (0, shape.padded - G), (0, 0)))
    parts = (B, K, splits, shape.padded)
    totals, tops, masses = pl.pallas_call(
        functools.partial(one_split, shape=shape),
        grid=(B, K, splits),
        out_shape=[jax.ShapeDtypeStruct(part, jnp.float32) for part in ((*parts, H), parts, parts)],
        compiler_params=pl_triton.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
        name="decode_triton",
    )(q_BKGH, k_PKCH, v_PKCH, table_BM + base, lengths_B)
    o_BKGH = merge(totals, tops, masses)[:, :, :G]
    return jnp.where((lengths_B > 0)[:, None, None], o_BKGH.reshape(B, N, H), 0)


def one_split(q_ref, k_ref, v_ref, table_ref, lengths_ref, total_ref, top_ref, mass_ref, *, shape: Shape):
    """One program: a share of one row's tiles, for the query heads of one kv head."""
    row, head, split = (pl.program_id(axis) for axis in range(3))
    length = lengths_ref[row]
    first_seen = jnp.int32(0) if shape.window is None else jnp.maximum(length - shape.window, 0)
    first = lax.div(first_seen, jnp.int32(shape.tile))
    count = lax.div(length + (shape.tile - 1), jnp.int32(shape.tile)) - first
    share = lax.div(count + (shape.splits - 1), jnp.int32(shape.splits))
    begin = first + jnp.minimum(split * share, count)
    end = first + jnp.minimum((split + 1) * share, count)
    q_gH = q_ref[row, head, :, :]

    def meet(tile, carry):
        total_gH, top_g, mass_g = carry
        position_s = tile * shape.tile + jnp.arange(shape.tile)
        seen_s = (position_s >= first_seen) & (position_s < length)
        blocks_s = table_ref[row, jnp.minimum(lax.div(position_s, jnp.int32(shape.block)), shape.columns - 1)]
        blocks_s = jnp.where(seen_s, blocks_s, 0)  # entries past the end may hold anything
        offset_s = lax.rem(position_s, jnp.int32(shape.block))
        k_sH = k_ref[blocks_s, head, offset_s, :]
        scores_gs = jnp.where(seen_s[None, :], dot(q_gH, k_sH.T), NOTHING)
        new_top_g = jnp.maximum(top_g, jnp.max(scores_gs, axis=1))
        keep_g = jnp.exp2(top_g - new_top_g)
        weights_gs = jnp.where(seen_s[None, :], jnp.exp2(scores_gs - new_top_g[:, None]), 0.0)
        v_sH = v_ref[blocks_s, head, offset_s, :]
        v_sH = jnp.where(seen_s[:, None], v_sH, jnp.zeros_like(v_sH))  # unwritten places may hold NaN
        total_gH = total_gH * keep_g[:, None] + dot(weights_gs.astype(v_sH.dtype), v_sH)
        return total_gH, new_top_g, mass_g * keep_g + jnp.sum(weights_gs, axis=1)

    nothing = (
        jnp.zeros(q_gH.shape, jnp.float32),
        jnp.full((shape.padded,), NOTHING, jnp.float32),
        jnp.zeros((shape.padded,), jnp.float32),
    )
    total_gH, top_g, mass_g = lax.fori_loop(begin, end, meet, nothing)
    total_ref[row, head, split, :, :] = total_gH
    top_ref[row, head, split, :] = top_g
    mass_ref[row, head, split, :] = mass_g


def dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """Summed in float32; float32 operands are not rounded to the tensor cores' TF32."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.dot(a, b, precision=precision, preferred_element_type=jnp.float32)


def merge(totals: jax.Array, tops: jax.Array, masses: jax.Array) -> jax.Array:
    """Join the splits, axis 2, of [B, K, splits, G, H]; splits that saw nothing have mass 0."""
    share = jnp.exp2(tops - jnp.max(tops, axis=2, keepdims=True))
    mass = jnp.sum(share * masses, axis=2)
    total = jnp.sum(share[..., None] * totals, axis=2)
    return total / jnp.where(mass > 0, mass, 1)[..., None]
