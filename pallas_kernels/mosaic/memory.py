"""How tiles lie in shared memory, and how they get into registers.

A tensor core reads a tile in boxes of 8 rows by 128, 64 or 32 bytes, whose 16-byte pieces are swizzled so that
rows fall on unlike banks. The widest box that divides a row is taken: 128 bytes for heads of 64, 128 or 256
two-byte numbers, 64 for heads of 96, 32 for heads of 80.

Its first operand has 64 rows. Where the head width stands there and is no multiple of 64, the last 64 rows overlap
the ones before, and what is computed twice comes out the same:

    width 80    rows 0..63 and 16..79
"""

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu

ROWS = 64
NO_INDEX = ((),) if jax.__version_info__ < (0, 11) else ()  # jax 0.10 wants an index, jax 0.11 warns of one


def box_bytes(width_bytes: int) -> int:
    """Bytes of a row of a box, for rows of `width_bytes`, a multiple of 32."""
    return next(size for size in (128, 64, 32) if width_bytes % size == 0)


def swizzled(size: int, itemsize: int) -> tuple[plgpu.TilingTransform, plgpu.SwizzleTransform]:
    """How [.., rows, width] lies in shared memory, in boxes of `size` bytes a row."""
    return plgpu.TilingTransform((8, size // itemsize)), plgpu.SwizzleTransform(size)


def parts_of(width: int) -> tuple[int, ...]:
    """Where each 64 of `width` rows begin."""
    return tuple(min(start, width - ROWS) for start in range(0, width, ROWS))


def load(ref, layout: plgpu.Layout, optimized: bool = True) -> jax.Array:
    """The contents of `ref` in registers. What is not optimized may lie in global memory."""
    return plgpu.load(ref, *NO_INDEX, layout=layout, optimized=optimized)
