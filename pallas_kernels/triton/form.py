"""Which shapes the Triton kernels serve, and what one of them is compiled for.

    pools of 16 bits   P K C H       float16, bfloat16; queries of either
    pools of 8 bits    P K C H, P K H C, scales P K C; blocks of at least 64
    heads              Triton's axes are powers of two, so a head is cut: 80 = 64 + 16, 96 = 64 + 32

Decided from shapes alone, while tracing.
"""

from typing import NamedTuple

import jax

from pallas_kernels.numerics import LOG2_E
from pallas_kernels.pools import Pool, Scaled, geometry
from pallas_kernels.shape import Shape
from pallas_kernels.target import Target

MIN_DOT = 16  # the shortest axis of a tensor core product
HEAD_WIDTHS = (32, 64, 80, 96, 128, 256)
BLOCKS = (16, 32, 64, 128)
FLOATS = ("bfloat16", "float16")
EIGHT_BITS = ("int8", "float8_e4m3fn")
MAX_GROUP = 64


class Form(NamedTuple):
    """What a kernel is compiled for."""

    group: int  # query heads of a kv head
    rows: int  # of both dots: query heads, times tokens for chunks
    tile: int  # positions
    block: int
    width: int  # of a head
    parts: tuple[tuple[int, int], ...]  # first and width of each part of a head
    window: int | None
    unit: float  # powers of two in one unit of a score
    squeeze: float | None  # scores are tanh(squeeze * q . k) under a soft cap


def unserved(target: Target, shape: Shape) -> str | None:
    """Why neither kernel can serve the shape, in words."""
    if target.platform != "cuda" or target.arch < 80:
        return f"needs compute capability 8.0 or later, not {target.platform} {target.arch / 10}"
    if shape.head_width not in HEAD_WIDTHS:
        return f"head width {shape.head_width} is not one of {HEAD_WIDTHS}"
    if shape.block not in BLOCKS:
        return f"blocks of {shape.block} positions are not one of {BLOCKS}"
    if shape.group > MAX_GROUP:
        return f"{shape.group} query heads for each kv head are more than {MAX_GROUP}"
    if shape.dtype not in FLOATS or shape.pool_dtype not in FLOATS + EIGHT_BITS:
        return f"multiplies 16-bit floats by the same or by 8 bits, not {shape.dtype} by {shape.pool_dtype}"
    if shape.pool_dtype in EIGHT_BITS and shape.block < 64:
        return f"8-bit pools have blocks of at least 64 positions, not {shape.block}"
    # Pallas counts bytes to choose between offsets of 32 and of 64 bits, and the offsets count numbers.
    if shape.pool_dtype in EIGHT_BITS and 2**31 < shape.pool_size <= 2**32:
        return f"cannot address {shape.pool_size} numbers of 8 bits, only up to 2^31, or more than 2^32"
    return None


def form_of(
    q: jax.Array, k: Pool, *, rows: int, tile: int, scale: float, window: int | None, soft_cap: float | None
) -> Form:
    """Of queries [.., N, H] and a pool of keys."""
    N, H = q.shape[-2:]
    _, K, C, _ = geometry(k)
    assert tile <= C or not isinstance(k, Scaled), (tile, C)
    unit, squeeze = (scale, None) if soft_cap is None else (soft_cap, scale / soft_cap)
    # Triton deals products that are wider than high to its warps by columns, others by rows, of which 16 feed one.
    parts = parts_of(H, MIN_DOT if rows > MIN_DOT else 2 * MIN_DOT)
    return Form(N // K, rows, tile, C, H, parts, window, unit * LOG2_E, squeeze)


def parts_of(width: int, least: int) -> tuple[tuple[int, int], ...]:
    """Cut a head into powers of two from `least` on, largest first; the last may hang over: 80 = 64 + 16 or 32."""
    parts = []
    first = 0
    while first < width:
        part = max(least, 1 << ((width - first).bit_length() - 1))
        parts.append((first, part))
        first += part
    return tuple(parts)
