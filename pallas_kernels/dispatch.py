"""The one door to attention: which implementation serves which shape on which target, and why.

    kind of step              parts
    invariant numerics        ordered            one order of sums for chunks and single tokens alike
    one token a row           decode
    a mix                     decode for the rows with one token, chunks for those with more

    part       the first of these that serves the shape
    decode     mosaic (Hopper), triton (other NVIDIA GPUs), xla
    chunks     mosaic, triton, xla
    ordered    mosaic, xla

The choice is made while tracing, from arguments alone: no device is asked, and nothing is chosen at import.
"""

import functools
from typing import Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from pallas_kernels import ragged, tuned
from pallas_kernels.blocks import write_kv
from pallas_kernels.mosaic import chunks as mosaic_chunks
from pallas_kernels.mosaic import decode as mosaic_decode
from pallas_kernels.mosaic import ordered as mosaic_ordered
from pallas_kernels.pools import Pool, Scaled, geometry
from pallas_kernels.ragged import Attend
from pallas_kernels.rows import Rows
from pallas_kernels.shape import Shape
from pallas_kernels.target import CPU, Target, platform_of, target_of
from pallas_kernels.triton import chunks as triton_chunks
from pallas_kernels.triton import decode as triton_decode
from pallas_kernels.xla import chunks as xla_chunks
from pallas_kernels.xla import decode as xla_decode
from pallas_kernels.xla import ordered as xla_ordered

Numerics = Literal["fast", "invariant"]
Part = Literal["decode", "chunks", "ordered"]

__all__ = [
    "CPU",
    "Choice",
    "Numerics",
    "Rows",
    "Shape",
    "Target",
    "attention",
    "attention_with_lse",
    "choose",
    "parts",
    "platform_of",
    "target_of",
    "write_kv",
]


class Kernel(Protocol):
    """A module that serves one part."""

    attend: Attend
    Config: type[tuple]

    def unserved(self, target: Target, shape: Shape) -> str | None:
        """Why it cannot serve this shape, in words."""


class Choice(NamedTuple):
    """Who serves a part, and why not somebody before it."""

    part: Part
    name: Literal["mosaic", "triton", "xla"]
    reason: str


KERNELS: dict[Part, tuple[tuple[str, Kernel], ...]] = {
    "decode": (("mosaic", mosaic_decode), ("triton", triton_decode)),
    "chunks": (("mosaic", mosaic_chunks), ("triton", triton_chunks)),
    "ordered": (("mosaic", mosaic_ordered),),
}


def attention(q_TNH: jax.Array, k: Pool, v: Pool, rows: Rows, **options) -> jax.Array:
    """`attention_with_lse` without the masses, in q's dtype."""
    return attention_with_lse(q_TNH, k, v, rows, dtype=q_TNH.dtype, **options)[0]


def attention_with_lse(
    q_TNH: jax.Array,
    k: Pool,
    v: Pool,
    rows: Rows,
    *,
    base: int | jax.Array,
    scale: float,
    window: int | None,
    numerics: Numerics,
    one_token: bool,
    soft_cap: float | None = None,
    sinks_N: jax.Array | None = None,
    target: Target = CPU,
    dtype: jnp.dtype = jnp.float32,
) -> tuple[jax.Array, jax.Array]:
    """Attention of each token over its row's blocks, padded tokens giving 0; equals `reference.attend`.

    Token i of row b stands at position p = start_b + i and sees max(0, p - window + 1)..p.
    base        added to the table: l * P for layer l of a pool that holds all layers
    soft_cap    scores become soft_cap * tanh(score / soft_cap)
    sinks_N     a logit of each query head that joins the mass of its softmax and adds no value
    one_token   static: T == B, and row b has token b or none
    dtype       of the outputs; all is summed in float32
    Returns outputs [T, N, H] and the log of each softmax's mass, float32 [T, N], by which parts can be merged.
    Raises ValueError, while tracing, when N is not a multiple of K, head widths differ, or blocks do not fit the
    tiles of the invariant mode.
    """
    shape = shape_of(q_TNH, k, v)
    rows = Rows(*(jnp.asarray(part, jnp.int32) for part in rows))
    shared = {"base": base, "scale": scale, "window": window, "soft_cap": soft_cap, "sinks_N": sinks_N}
    tokens = q_TNH.shape[0]
    serve = [_implementation(part, target, shape, tokens, dtype) for part in parts(numerics, one_token)]
    if numerics == "invariant":
        o_TNH, lse_TN = serve[0](q_TNH, k, v, rows, **shared)
    elif one_token:
        o_TNH, lse_TN = ragged.single(serve[0], q_TNH, k, v, rows, **shared)
    else:
        o_TNH, lse_TN = ragged.mixed(*serve, q_TNH, k, v, rows, **shared)
    return o_TNH.astype(dtype), lse_TN


def parts(numerics: Numerics, one_token: bool) -> tuple[Part, ...]:
    """The parts that a step is served by."""
    if numerics == "invariant":
        return ("ordered",)
    return ("decode",) if one_token else ("decode", "chunks")


def choose(part: Part, target: Target, shape: Shape) -> Choice:
    """Name the implementation that serves this shape, with the reason in words."""
    if target.platform != "cuda":
        return Choice(part, "xla", f"no kernel is written for platform {target.platform}")
    reasons = []
    for name, kernel in KERNELS[part]:
        reason = kernel.unserved(target, shape)
        if reason is None:
            return Choice(part, name, "; ".join(reasons) or f"compute capability {target.arch / 10}")
        reasons.append(f"{name}: {reason}")
    return Choice(part, "xla", "; ".join(reasons) or "no kernel is written for it")


def shape_of(q_TNH: jax.Array, k: Pool, v: Pool) -> Shape:
    """Raises ValueError when queries, keys and values do not belong together."""
    _, N, H = q_TNH.shape
    _, K, C, pool_H = geometry(k)
    keys, values = jax.tree.leaves(k)[0], jax.tree.leaves(v)[0]
    turned = (*keys.shape[:2], pool_H, C) if isinstance(v, Scaled) else keys.shape
    if N % K or pool_H != H or values.shape != turned or isinstance(k, Scaled) != isinstance(v, Scaled):
        found = f"queries {q_TNH.shape}, keys {keys.shape}, values {values.shape}"
        raise ValueError(f"{found}: expected TNH, PKCH, PKCH, and PKHC for values of 8 bits")
    return Shape(N // K, H, C, q_TNH.dtype.name, keys.dtype.name, keys.size)


@functools.cache
def _shared(attend: Attend, **fixed: object) -> Attend:
    """A function of its own in the program, one for all layers: else every layer's kernel is compiled by itself."""
    static = ("scale", "window", "soft_cap", "target", "config", *fixed)
    return functools.partial(jax.jit(attend, static_argnames=static), **fixed)


def _implementation(part: Part, target: Target, shape: Shape, tokens: int, dtype: jnp.dtype) -> Attend:
    name = choose(part, target, shape).name
    if name != "xla":
        kernel = dict(KERNELS[part])[name]
        found = tuned.find(target, part, shape, tokens, kernel=name, fields=kernel.Config._fields)
        # The merge of this one writes any dtype, which spares a launch a layer.
        own = {"dtype": jnp.dtype(dtype)} if kernel is mosaic_decode else {}
        attend = _shared(kernel.attend, **own)
        return functools.partial(attend, target=target, config=found and kernel.Config(**found))
    if part == "ordered":
        return xla_ordered.attend
    module = xla_decode if part == "decode" else xla_chunks
    return functools.partial(module.attend, platform=target.platform)
