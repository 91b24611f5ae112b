"""The one door to attention: which implementation serves which shape on which platform, and why.

    numerics invariant                        -> ordered         one order of sums, everywhere
    cuda, one token a row, served shape       -> decode_triton   Pallas through the Triton lowering
    everything else                           -> ragged          XLA: cpu, tpu, rocm, chunks, odd shapes

The choice is made while tracing, from arguments alone: no device is asked, and nothing is chosen at import.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import ordered, ragged
from pallas_kernels.blocks import write_kv
from pallas_kernels.rows import Rows
from pallas_kernels.triton import decode as triton_decode

Numerics = Literal["fast", "invariant"]

__all__ = ["Choice", "Numerics", "Rows", "attention", "choose", "platform_of", "write_kv"]


class Choice(NamedTuple):
    name: Literal["ordered", "decode_triton", "ragged"]
    reason: str


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
    """Attention of each token over its row's blocks, padded tokens giving 0; equals `reference.attention`.

    Token i of row b stands at position p = start_b + i and sees max(0, p - window + 1)..p.
    base        added to the table: l * P for layer l of a pool that holds all layers
    one_token   static: T == B and no row has more than one token
    platform    `platform_of` the mesh's devices
    Returns [T, N, H] in q's dtype, summed in float32. A pool of uint16 holds bfloat16.
    Raises ValueError, while tracing, when N is not a multiple of K, head widths differ, or blocks do not fit
    the tiles of the invariant mode.
    """
    T, N, H = q_TNH.shape
    _, K, C, pool_H = k_PKCH.shape
    if N % K or pool_H != H or k_PKCH.shape != v_PKCH.shape:
        raise ValueError(
            f"queries {q_TNH.shape}, keys {k_PKCH.shape}, values {v_PKCH.shape}: expected TNH, PKCH, PKCH"
        )
    rows = Rows(*(jnp.asarray(part, jnp.int32) for part in rows))
    choice = choose(platform, numerics, one_token=one_token, head_width=H, block=C, pool_dtype=k_PKCH.dtype)
    shared = {"base": base, "scale": scale, "window": window}
    if choice.name == "ordered":
        return ordered.attention(q_TNH, k_PKCH, v_PKCH, rows, **shared)
    if choice.name == "decode_triton":
        return ragged.decode_with(triton_decode.attend, q_TNH, k_PKCH, v_PKCH, rows, **shared)
    return ragged.attention(q_TNH, k_PKCH, v_PKCH, rows, one_token=one_token, platform=platform, **shared)


def choose(
    platform: str, numerics: Numerics, *, one_token: bool, head_width: int, block: int, pool_dtype: jnp.dtype
) -> Choice:
    """Name the implementation that serves this shape, with the reason in words."""
    if numerics == "invariant":
        return Choice("ordered", "invariant numerics have one order of sums on every platform")
    if platform != "cuda":
        return Choice("ragged", f"no kernel is written for platform {platform}")
    if not one_token:
        return Choice("ragged", "rows with several tokens have no kernel")
    if head_width not in triton_decode.HEAD_WIDTHS:
        return Choice("ragged", f"head width {head_width} is not one of {triton_decode.HEAD_WIDTHS}")
    if block & (block - 1):
        return Choice("ragged", f"blocks of {block} positions are no power of two")
    if jnp.dtype(pool_dtype).name not in ("float32", "bfloat16", "float16"):
        return Choice("ragged", f"the kernel does not read pools of {jnp.dtype(pool_dtype).name}")
    return Choice("decode_triton", "one token a row on an NVIDIA GPU")


def platform_of(device: jax.Device) -> str:
    """cpu, tpu, cuda, rocm, or gpu where the maker is unknown: jax calls every GPU's platform gpu."""
    if device.platform != "gpu":
        return device.platform
    makers = {"NVIDIA": "cuda", "AMD": "rocm"}
    return next((name for maker, name in makers.items() if maker in device.device_kind), "gpu")
