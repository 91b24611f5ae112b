"""The one door to attention: which implementation serves which shape on which platform, and why."""

from typing import Literal

import jax

from pallas_kernels import ordered, ragged
from pallas_kernels.blocks import write_kv
from pallas_kernels.rows import Rows

Numerics = Literal["fast", "invariant"]

__all__ = ["Numerics", "Rows", "attention", "write_kv"]


def attention(
    q_TNH: jax.Array,
    k_PKCH: jax.Array,
    v_PKCH: jax.Array,
    rows: Rows,
    *,
    base: int | jax.Array,
    scale: float,
    window: int | None,
    numerics: Numerics,
    one_token: bool,
    platform: str = "cpu",
) -> jax.Array:
    """Attention of each token over its row's blocks, padded tokens giving 0.

    Token i of row b stands at position p = start_b + i and sees max(0, p - window + 1)..p.
    one_token   static: T == B and no row has more than one token
    platform    that of the mesh's devices ("cpu", "gpu", ...)
    Returns [T, N, H] in q's dtype, summed in float32.
    """
    shared = {"base": base, "scale": scale, "window": window}
    if numerics == "invariant":
        return ordered.attention(q_TNH, k_PKCH, v_PKCH, rows, **shared)
    return ragged.attention(q_TNH, k_PKCH, v_PKCH, rows, one_token=one_token, platform=platform, **shared)
