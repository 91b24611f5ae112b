"""Products with sharded weights: the one place that knows how a matrix meets the activations.

    column_parallel   x_TD replicated, w_DX split over X   ->  y_TX split          no collective
    row_parallel      x_TX split, w_XD split over X        ->  y_TD replicated     one all-reduce
    (the head is column-parallel over the vocabulary)

Runs inside `jax.shard_map` over mesh axes ('kv', 'rep') with check_vma=False; weights are stored [in, out], or are
a Quantised, whose scales split with their columns and, where they are those of groups of rows, with their rows.

fast       one dot per matrix, written x times w: a transposed form that XLA fails to fold costs sixfold on CPU.
           There, XLA gives a product of one row to one thread, which cannot read the weight as fast as two: it is
           written as a batch of eight. A bfloat16 product of one row is padded to two, which is ten times faster.
           Rejected: products of 2 to 16 rows as batches 8 deep, 1.3 to 2.3 times faster alone and 2 to 7 times
           slower inside a decoder.
invariant  the same bits whatever the mesh (1, 2, 4, 8) and the batch: every dot has one shape everywhere. Rows come
           in tiles of 8 in a loop, columns in eighths of their logical width, a contraction over a sharded axis in
           eighths that are gathered and added in a fixed tree. An axis that 8 does not divide is cut in the largest
           power of two that does; a mesh that splits the axis divides that too. A quantised weight is widened
           to the numbers it stands for, which are the same on every mesh, and cut alike.

Source: DESIGN.md, "Costs we know" and "Numerics".
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.dispatch import Numerics, Target
from pallas_kernels.matmul import matmul
from pallas_kernels.quantised import Quantised, cut, dequantise
from sharding.rules import TP

UNITS = 8  # pieces that an axis is cut into, and the widest mesh of 'invariant'
TILE_ROWS = 8
PARALLEL = 8  # pieces of one product of one row on CPU, for as many threads
Weight = jax.Array | Quantised


@dataclass(frozen=True, slots=True)
class Method:
    """How products are computed; static in a trace.

    target    that of the mesh's devices
    dynamic   tokens are rounded to 8 bits before they meet a quantised weight
    """

    numerics: Numerics
    target: Target
    dynamic: bool = False

    @property
    def platform(self) -> str:
        return self.target.platform

    def check(self, tp: int) -> None:
        """Raises ValueError where the mesh cannot give the promised bits."""
        if self.numerics == "invariant" and tp not in (1, 2, 4, 8):
            raise ValueError(f"numerics invariant: got a mesh of {tp}; expected 1, 2, 4 or 8 devices")
        if self.numerics == "invariant" and self.dynamic:
            raise ValueError("numerics invariant: a token's scale would depend on the mesh; expected dynamic off")


def mesh_size() -> int:
    """tp of the mesh around this trace."""
    return lax.axis_size("kv") * lax.axis_size("rep")


def shard_index() -> jax.Array:
    """Flat number of this device: kv_index * rep + rep_index."""
    return lax.axis_index("kv") * lax.axis_size("rep") + lax.axis_index("rep")


def column_parallel(x_TD: jax.Array, w_DX: Weight, parts: Sequence[tuple[int, int]], how: Method) -> jax.Array:
    """x times this shard's columns; float32 [T, X local].

    parts   (local, logical) width of each matrix that the columns of w hold side by side
    """
    if how.numerics == "fast":
        return _product(x_TD, w_DX, how)
    pieces, start = [], 0
    for local, logical in parts:
        width = logical // math.gcd(logical, UNITS)
        pieces += [_cut(w_DX, "X", i, i + width, x_TD.dtype) for i in range(start, start + local, width)]
        start += local
    return _by_tiles(lambda x_tD: jnp.concatenate([_tile_dot(x_tD, w) for w in pieces], axis=1), x_TD)


def row_parallel(x_TX: jax.Array, w_XD: Weight, logical: int, how: Method) -> jax.Array:
    """x times this shard's rows, summed over the mesh; [T, D] in x's dtype.

    logical   length of X over the whole mesh
    """
    tp = mesh_size()
    if how.numerics == "fast":
        # Summed in x's dtype: decoding over many devices is bound by the bytes of this sum.
        y_TD = _product(x_TX, w_XD, how).astype(x_TX.dtype)
        return y_TD if tp == 1 else lax.psum(y_TD, TP)
    width = logical // math.gcd(logical, UNITS)
    cuts = [(start, start + width) for start in range(0, x_TX.shape[1], width)]
    pieces = [_cut(w_XD, "D", start, stop, x_TX.dtype) for start, stop in cuts]

    def tile(x_tX: jax.Array) -> jax.Array:
        return _add([_tile_dot(x_tX[:, i:j], w) for (i, j), w in zip(cuts, pieces, strict=True)])

    y_TD = _by_tiles(tile, x_TX)
    if tp > 1:
        y_TD = _add(list(lax.all_gather(y_TD, TP)))
    return y_TD.astype(x_TX.dtype)


def _add(parts: Sequence[jax.Array]) -> jax.Array:
    """Sum of 1, 2, 4 or 8 arrays; neighbours first, so that a shard's own pieces are a subtree of the whole."""
    while len(parts) > 1:
        parts = [left + right for left, right in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


def _product(x_TD: jax.Array, w_DX: Weight, how: Method) -> jax.Array:
    """x times a weight of either kind, the quickest way; float32."""
    if isinstance(w_DX, Quantised):
        return matmul(x_TD, w_DX, dynamic=how.dynamic, target=how.target)
    return _dot(x_TD, w_DX, how.platform)


def _cut(w_DX: Weight, letter: Literal["D", "X"], start: int, stop: int, dtype: jnp.dtype) -> jax.Array:
    """Rows (D) or columns (X) start..stop - 1 of a weight, as plain numbers; `dtype` is that of a widened one."""
    if isinstance(w_DX, Quantised):
        # A barrier, because XLA merges a loop of one turn with what is around it, and then multiplies otherwise.
        return lax.optimization_barrier(dequantise(cut(w_DX, letter, start, stop)).astype(dtype))
    return lax.slice_in_dim(w_DX, start, stop, axis="DX".index(letter))


def _dot(x_TD: jax.Array, w_DX: jax.Array, platform: str) -> jax.Array:
    """One plain product in float32."""
    (T, D), X = x_TD.shape, w_DX.shape[1]
    if platform == "cpu" and T == 1 and w_DX.dtype == jnp.bfloat16:
        return _tile_dot(jnp.pad(x_TD, ((0, 1), (0, 0))), w_DX)[:1]
    if platform == "cpu" and T == 1 and D % PARALLEL == 0:
        # The same bytes seen as a batch of products, which XLA gives to its threads one by one.
        batch = (PARALLEL, D // PARALLEL)
        over = (((1,), (1,)), ((0,), (0,)))
        partial_PX = lax.dot_general(x_TD.reshape(batch), w_DX.reshape(*batch, X), over)
        return jnp.sum(partial_PX, axis=0, keepdims=True)
    return _tile_dot(x_TD, w_DX)


def _tile_dot(x_tD: jax.Array, w_DX: jax.Array) -> jax.Array:
    return lax.dot(x_tD, w_DX, preferred_element_type=jnp.float32)


def _by_tiles(tile: Callable[[jax.Array], jax.Array], x_TD: jax.Array) -> jax.Array:
    """`tile` over every 8 rows, in a loop: unrolled tiles are fused each their own way, and compile slowly."""
    rows, width = x_TD.shape
    tiles = -(-rows // TILE_ROWS)
    padded = jnp.pad(x_TD, ((0, tiles * TILE_ROWS - rows), (0, 0))).reshape(tiles, TILE_ROWS, width)
    return lax.map(tile, padded).reshape(tiles * TILE_ROWS, -1)[:rows]
