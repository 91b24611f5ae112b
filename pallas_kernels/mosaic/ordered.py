"""The invariant mode on Hopper: `chunks` with tiles of 64 positions in order, for chunks and single tokens alike.

Nothing is split, and nothing that was tuned is used: tile and path are fixed, and what is left to choose, the
stages of the ring and the query heads of a tile, moves rows about and no bit. A row's sums take part in products
of one shape with one order of tiles, whatever stands in the other rows.

Cost: a row with one token fills one place of 128 // heads; tiles of 64 rather than 128 positions, all masked.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.mosaic import chunks
from pallas_kernels.mosaic.chunks import Config, unserved
from pallas_kernels.pools import Pool, geometry
from pallas_kernels.rows import Rows, owners
from pallas_kernels.shape import Shape
from pallas_kernels.target import H200, Target

__all__ = ["Config", "attend", "unserved"]


def attend(
    q_TNH: jax.Array,
    k: Pool,
    v: Pool,
    rows: Rows,
    *,
    target: Target = H200,
    config: Config | None = None,
    **options,
) -> tuple[jax.Array, jax.Array]:
    """`chunks.attend` with one set of bits for one sequence, in float32; 0 and -inf for tokens of no row."""
    if config is not None:
        raise ValueError(f"got {config}; expected none, since bits must not depend on it")
    T, N, H = q_TNH.shape
    _, K, C, _ = geometry(k)
    shape = Shape(N // K, H, C, q_TNH.dtype.name, q_TNH.dtype.name)
    config = chunks.rule(shape, T, len(rows.first_B), ordered=True)
    o_TNH, lse_TN = chunks.attend(q_TNH, k, v, rows, target=target, config=config, **options)
    live_T = owners(rows, T).live_T
    o_TNH = jnp.where(live_T[:, None, None], o_TNH, 0).astype(jnp.float32)
    return o_TNH, jnp.where(live_T[:, None], lse_TN, -jnp.inf)
