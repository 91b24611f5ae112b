"""What both Triton kernels do with one tile of s positions: read it, score it, add it to a running softmax.

    place      which block, where in it      s <= C: one block and a slice of it; s > C: a block for each position
    keys       k_sh, head part by head part  Triton's axes are powers of two: heads of 80 are 64 + 16, of 96 64 + 32
    scores_rs  sum over parts of q_rh . k_sh^T, r rows of queries
    state      totals_rh, top_r, mass_r      softmax so far, in base 2

Scores are kept in units: q . k itself, or tanh(scale * q . k / cap) under a soft cap. One unit is `unit` powers of
two, which the exponential multiplies in, so that a plain score costs no multiplication of its own.

Positions that nobody may see can hold NaN, so their values are read as 0. 8-bit numbers need no such care: as read
here they are always finite, and their scales are read as 0. float8 becomes float by moving its bits, with an
exponent too small by a constant, which the scale makes good: GPUs before 8.9 have no instruction for it.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton as pl_triton

from pallas_kernels.numerics import NOTHING
from pallas_kernels.pools import Pool, Scaled
from pallas_kernels.triton.form import LOG2_E, Form

LEAST = -1e25  # the top of rows that saw nothing yet: so far above NOTHING that unseen weights are 0


class Heads(NamedTuple):
    """What a program multiplies: its queries, and the pools of its kv head."""

    q_rh: tuple[jax.Array, ...]  # by part
    k: Pool  # of refs
    v: Pool
    head: jax.Array
    weight_dtype: jnp.dtype  # of the product with values; that with keys has the queries'


class Place(NamedTuple):
    """A tile of positions in the pool."""

    block: jax.Array  # one, or [s]
    offset_s: jax.Array  # in the block
    read_s: jax.Array | None  # true where something may be read; None: everywhere


class Running(NamedTuple):
    """Softmax so far, not yet divided by its mass."""

    totals_rh: tuple[jax.Array, ...]  # by part
    top_r: jax.Array  # in units
    mass_r: jax.Array


def columns_of(part: tuple[int, int], form: Form) -> tuple[jax.Array, jax.Array | None]:
    """Those of a part [h], and which of them a head has; None: all."""
    first, width = part
    column_h = first + jnp.arange(width, dtype=jnp.int32)
    return column_h, column_h < form.width if first + width > form.width else None


def find(table_ref, base, row, at, form: Form, seen: tuple[jax.Array, jax.Array] | None) -> Place:
    """Tile `at` of a row. Positions outside of seen[0]..seen[1] - 1 are not read; None: there are none."""
    s, C = form.tile, form.block
    within_s = jnp.arange(s, dtype=jnp.int32)
    position_s = at * s + within_s
    read_s = None if seen is None else (position_s >= seen[0]) & (position_s < seen[1])
    if s <= C:  # one block, which holds a position that is read, so its number is valid
        tiles = jnp.int32(C // s)
        return Place(base + table_ref[row, lax.div(at, tiles)], lax.rem(at, tiles) * s + within_s, read_s)
    entries = table_ref.at[row, lax.div(position_s, jnp.int32(C))]
    numbers_s = pl_triton.load(entries, mask=read_s, other=None if read_s is None else jnp.int32(0))
    return Place(base + numbers_s, lax.rem(position_s, jnp.int32(C)), read_s)


def load_keys(k: Pool, place: Place, head, part: tuple[int, int], dtype: jnp.dtype, form: Form) -> jax.Array:
    """One part of a tile's keys [s, h], or values of a plain pool, in `dtype`."""
    column_h, held_h = columns_of(part, form)
    block = place.block[:, None] if place.block.ndim else place.block
    numbers = k.numbers if isinstance(k, Scaled) else k
    where = numbers.at[block, head, place.offset_s[:, None], column_h[None]]
    if isinstance(k, Scaled):
        return widen(pl_triton.load(where, mask=spread(None, held_h, form.tile, part[1])), dtype)
    mask = spread(place.read_s, held_h, form.tile, part[1])
    return pl_triton.load(where, mask=mask, other=None if mask is None else 0.0).astype(dtype)


def load_values(v: Pool, place: Place, head, part: tuple[int, int], dtype: jnp.dtype, form: Form) -> jax.Array:
    """One part of a tile's values [s, h] in `dtype`; those of a scaled pool lie transposed."""
    if not isinstance(v, Scaled):
        return load_keys(v, place, head, part, dtype, form)
    column_h, held_h = columns_of(part, form)
    where = v.numbers.at[place.block, head, column_h[:, None], place.offset_s[None]]
    return widen(pl_triton.load(where, mask=spread(held_h, None, part[1], form.tile)), dtype).T


def spread(rows: jax.Array | None, columns: jax.Array | None, num_rows: int, num_columns: int) -> jax.Array | None:
    """The mask of both; None where there is neither."""
    if rows is None and columns is None:
        return None
    masks = [mask for mask in (None if rows is None else rows[:, None], columns) if mask is not None]
    return jnp.broadcast_to(functools.reduce(jnp.logical_and, masks), (num_rows, num_columns))


def widen(numbers: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """8-bit numbers in `dtype`; float8 comes out smaller by `lack`."""
    if numbers.dtype == jnp.int8:
        return numbers.astype(dtype)
    bits = lax.bitcast_convert_type(numbers, jnp.int8).astype(jnp.int16)  # the sign fills the upper half
    if dtype == jnp.bfloat16:  # sign, 8 bits of exponent, 7 of mantissa, from sign, 4 and 3
        return lax.bitcast_convert_type((bits << 4) & jnp.int16(0x87F0 - (1 << 16)), jnp.bfloat16)
    half = lax.bitcast_convert_type((bits << 7) & jnp.int16(0xBFFF - (1 << 16)), jnp.float16)  # sign, 5 and 10
    return half.astype(dtype)


def lack(numbers_dtype: jnp.dtype, dtype: jnp.dtype) -> float:
    """What `widen` leaves to multiply by: exponents are biased by 7 in float8, 127 in bfloat16, 15 in float16."""
    if numbers_dtype == jnp.int8:
        return 1.0
    return 2.0 ** (127 - 7) if dtype == jnp.bfloat16 else 2.0 ** (15 - 7)


def load_scales(pool: Scaled, place: Place, head, dtype: jnp.dtype) -> jax.Array:
    """[s], made good for what `widen` to `dtype` lacks; 0 where nothing may be read."""
    scales_s = pool.scales_PKC[place.block, head, place.offset_s]
    if place.read_s is not None:
        scales_s = jnp.where(place.read_s, scales_s, 0.0)
    return scales_s * lack(pool.numbers.dtype, dtype)


def load_heads(q_ref, k, v, head, token, head_r, live_r, form: Form) -> Heads:
    """Queries of `token` (one, or [r]) and head_r; rows that are not live are 0."""
    scaled = isinstance(k, Scaled)
    narrow = jnp.float32 if q_ref.dtype == jnp.float32 else jnp.bfloat16  # holds any weight times any scale
    dtype = q_ref.dtype if scaled else k.dtype
    q_rh = tuple(
        pl_triton.load(q_ref.at[where], mask=mask, other=0.0).astype(dtype)
        for where, mask in indices(token, head_r, live_r, form)
    )
    return Heads(q_rh, k, v, head, narrow if scaled else v.dtype)


def indices(token, head_r, live_r, form: Form):
    """For each part of a head, where rows lie in an array [.., N, H], and the mask of what is live of them."""
    token = token[:, None] if token.ndim else token
    for part in form.parts:
        column_h, held_h = columns_of(part, form)
        yield (token, head_r[:, None], column_h[None]), spread(live_r, held_h, form.rows, part[1])


def nothing_yet(form: Form, top_r: jax.Array | None = None) -> Running:
    """The state before the first tile; with top_r, after a sink of that score."""
    zeros_r = jnp.zeros((form.rows,), jnp.float32)
    totals_rh = tuple(jnp.zeros((form.rows, width), jnp.float32) for _, width in form.parts)
    if top_r is None:
        return Running(totals_rh, zeros_r + LEAST, zeros_r)
    return Running(totals_rh, jnp.maximum(top_r, LEAST), zeros_r + 1)


def meet(state: Running, heads: Heads, place: Place, seen: jax.Array | None, form: Form) -> Running:
    """Add one tile. seen [1, s] or [r, s] says which row sees which position; None: every row every one."""
    _, k, v, head, dtype = heads
    scores_rs = score(heads, place, form)
    if seen is not None:
        scores_rs = jnp.where(seen, scores_rs, NOTHING)
    top_r = jnp.maximum(state.top_r, jnp.max(scores_rs, axis=1))
    keep_r = jnp.exp2((state.top_r - top_r) * form.unit)
    weights_rs = jnp.exp2(scores_rs * form.unit - (top_r * form.unit)[:, None])
    mass_r = state.mass_r * keep_r + jnp.sum(weights_rs, axis=1)
    if isinstance(v, Scaled):
        weights_rs *= load_scales(v, place, head, dtype)[None]
    weights_rs = weights_rs.astype(dtype)
    totals_rh = tuple(
        total_rh * keep_r[:, None] + dot(weights_rs, load_values(v, place, head, part, dtype, form))
        for total_rh, part in zip(state.totals_rh, form.parts, strict=True)
    )
    return Running(totals_rh, top_r, mass_r)


def score(heads: Heads, place: Place, form: Form) -> jax.Array:
    """Scores [r, s] in units."""
    q_rh, k, _, head, _ = heads
    scores_rs = sum(
        dot(q_part_rh, load_keys(k, place, head, part, q_part_rh.dtype, form).T)
        for q_part_rh, part in zip(q_rh, form.parts, strict=True)
    )
    if isinstance(k, Scaled):
        scores_rs *= load_scales(k, place, head, q_rh[0].dtype)[None]
    return scores_rs if form.squeeze is None else tanh(form.squeeze * scores_rs)


def tanh(x: jax.Array) -> jax.Array:
    """By one exponential and one division, without branches; off by 1e-7 at most."""
    return 1 - 2 / (1 + jnp.exp2(x * (2 * LOG2_E)))


def dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """Summed in float32; float32 operands are not rounded to the tensor cores' TF32."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.dot(a, b, precision=precision, preferred_element_type=jnp.float32)
