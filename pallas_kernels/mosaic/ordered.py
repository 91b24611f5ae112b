"""The invariant mode on Hopper: `chunks` with tiles of 64 positions in order, for chunks and single tokens alike.

Nothing is split, and nothing that was tuned is used: tile and path are fixed, and what is left to choose, the
stages of the ring and the query heads of a tile, moves rows about and no bit. A row's sums take part in products
of one shape with one order of tiles, whatever stands in the other rows.

Cost: a row with one token fills one place of 128 // heads; tiles of 64 rather than 128 positions, all masked.
"""

import jax

from pallas_kernels.mosaic import chunks
from pallas_kernels.mosaic.chunks import unserved
from pallas_kernels.pools import Pool, geometry
from pallas_kernels.rows import Rows
from pallas_kernels.shape import Shape
from pallas_kernels.target import H200, Target

__all__ = ["attend", "unserved"]


def attend(
    q_TNH: jax.Array, k: Pool, v: Pool, rows: Rows, *, target: Target = H200, **options
) -> tuple[jax.Array, jax.Array]:
    """`chunks.attend` with one set of bits for one sequence."""
    T, N, H = q_TNH.shape
    _, K, C, _ = geometry(k)
    shape = Shape(N // K, H, C, q_TNH.dtype.name, q_TNH.dtype.name)
    config = chunks.rule(shape, T, len(rows.first_B), ordered=True)
    return chunks.attend(q_TNH, k, v, rows, target=target, config=config, **options)
