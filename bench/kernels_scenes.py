"""Steps on a device: those that are judged hold NaN wherever nothing was written, those that are timed are full.

    judged    one base of a pool whose other blocks, and positions past each row's end, are NaN
    timed     copies of a pool, so that calls one after the other find nothing in the cache

Tables are shuffled and, past each row's end, wild. Judged keys and values are made on the host, where the judge
reads them; timed ones are a random tile of blocks again and again.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import served
from pallas_kernels.pools import Pool, Scaled
from pallas_kernels.rows import Rows

Span = tuple[int, int]  # start, count
TILE_BYTES = 16 << 20
UNWRITTEN_INT8 = 77  # int8 has no NaN; the scales of what was not written have


class Scene(NamedTuple):
    """A step and what its keys and values are; rows on the host."""

    q_TNH: jax.Array
    k: Pool
    v: Pool
    rows: Rows
    base: int
    keys_UCKH: np.ndarray  # as the pools hold them, float32, the used blocks of all rows in order
    values_UCKH: np.ndarray
    used_B: np.ndarray  # blocks of each row

    def seen(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Keys and values [S, K, H] of the blocks of a row, float64."""
        first = int(self.used_B[:row].sum())
        blocks = slice(first, first + int(self.used_B[row]))
        return tuple(
            array[blocks].reshape(-1, *array.shape[2:]).astype(np.float64)
            for array in (self.keys_UCKH, self.values_UCKH)
        )


def judged(rng: np.random.Generator, row: served.Row, spans: Sequence[Span], tokens: int) -> Scene:
    """A step of `tokens` tokens of which `spans` are rows; the rest is padding."""
    model = served.MODELS[row.model]
    K, C, H = model.kv_heads, row.block, model.head_width
    starts_B, counts_B = (np.array(part, np.int32) for part in zip(*spans, strict=True))
    ends_B = np.where(counts_B > 0, starts_B + counts_B, 0)
    used_B = -(-ends_B // C)
    layers = max(2, row.blocks // 8192)
    P = row.blocks // layers
    table_BM = rng.integers(-(2**31), 2**31, (len(spans), row.columns)).astype(np.int32)
    names = rng.permutation(P)[: used_B.sum()].astype(np.int32)
    if len(names) < used_B.sum():
        raise ValueError(f"{row.name}: {used_B.sum()} blocks are needed, a layer has {P}")
    named = np.arange(row.columns) < used_B[:, None]
    table_BM[named] = names
    ends_U = np.repeat(ends_B, used_B)
    within_U = np.concatenate([np.arange(used) for used in used_B]) * C
    written_UC = within_U[:, None] + np.arange(C) < ends_U[:, None]
    base = (layers - 1) * P
    kind = jnp.dtype(row.pool or row.dtype)
    pools = []
    for values_last in (False, True):
        x_UCKH = rng.standard_normal((len(names), C, K, H), np.float32)
        x_UCKH[~written_UC] = np.nan
        pools.append(_pool(x_UCKH, kind, row.blocks, base + names, values_last))
    (k, keys_UCKH), (v, values_UCKH) = pools
    q_TNH = jnp.asarray(rng.standard_normal((tokens, model.heads, H), np.float32), row.dtype)
    first_B = np.arange(tokens) if not row.rows else np.cumsum(counts_B) - counts_B  # decode: token b is row b's
    first_B = first_B.astype(np.int32)
    return Scene(q_TNH, k, v, Rows(first_B, starts_B, counts_B, table_BM), base, keys_UCKH, values_UCKH, used_B)


def _pool(
    x_UCKH: np.ndarray, kind: np.dtype, blocks: int, at_U: np.ndarray, values: bool
) -> tuple[Pool, np.ndarray]:
    """A pool on the device that holds x in the blocks `at_U`, and what its numbers stand for."""
    if kind.itemsize > 1:
        numbers = x_UCKH.astype(kind)
        return _filled(numbers.swapaxes(1, 2), np.nan, blocks, at_U), numbers.astype(np.float32)
    whole = kind == np.int8
    largest = 127.0 if whole else float(jnp.finfo(kind).max)
    scales_UCK = np.abs(x_UCKH).max(axis=-1) / np.float32(largest)
    numbers = x_UCKH / scales_UCK[..., None]
    if whole:
        numbers = np.where(np.isnan(numbers), UNWRITTEN_INT8, np.rint(numbers))
    numbers = numbers.astype(kind)
    meant_UCKH = numbers.astype(np.float32) * scales_UCK[..., None]
    numbers = numbers.transpose(0, 2, 3, 1) if values else numbers.swapaxes(1, 2)
    fill = UNWRITTEN_INT8 if whole else np.nan
    held = _filled(numbers, fill, blocks, at_U), _filled(scales_UCK.swapaxes(1, 2), np.nan, blocks, at_U)
    return Scaled(*held), meant_UCKH


def _filled(part: np.ndarray, fill: float, blocks: int, at_U: np.ndarray) -> jax.Array:
    """[blocks, ...] of `fill` with `part` in the blocks `at_U`; no second copy of it is made."""
    whole = jnp.full((blocks, *part.shape[1:]), fill, part.dtype)
    write = jax.jit(lambda whole, at_U, part: whole.at[at_U].set(part), donate_argnums=0)
    return write(whole, jnp.asarray(at_U), jnp.asarray(np.ascontiguousarray(part)))


def timed_pools(blocks: int, K: int, C: int, H: int, pool: str) -> tuple[Pool, Pool]:
    """Keys and values of `blocks` blocks, random numbers without NaN."""
    rng = np.random.default_rng(0)
    shapes = (blocks, K, C, H), (blocks, K, H, C) if pool in ("int8", "float8_e4m3fn") else (blocks, K, C, H)
    numbers = [_random(rng, shape, pool) for shape in shapes]
    if pool not in ("int8", "float8_e4m3fn"):
        return numbers[0], numbers[1]
    unit = 1 / 40 if pool == "int8" else 1.0
    return Scaled(numbers[0], jnp.full((blocks, K, C), unit)), Scaled(numbers[1], jnp.full((blocks, K, C), unit))


def _random(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> jax.Array:
    """Blocks repeat, so that tens of gigabytes are made at the speed of writing them."""
    block_bytes = math.prod(shape[1:]) * jnp.dtype(dtype).itemsize
    distinct = min(shape[0], max(1, TILE_BYTES // block_bytes))
    x = rng.standard_normal((distinct, *shape[1:]), np.float32)
    x = np.clip(np.rint(40 * x), -127, 127) if dtype == "int8" else x
    return _repeated(jnp.asarray(x.astype(jnp.dtype(dtype))), shape[0])


@functools.partial(jax.jit, static_argnames="blocks")
def _repeated(x: jax.Array, blocks: int) -> jax.Array:
    whole = jnp.broadcast_to(x, (-(-blocks // len(x)), *x.shape))
    return whole.reshape(-1, *x.shape[1:])[:blocks]


def timed_table(rng: np.random.Generator, lengths: Sequence[int], C: int, columns: int) -> np.ndarray:
    """[B, columns]: scattered blocks of a pool that has just enough of them; wild past each row's end."""
    used_B = -(-np.asarray(lengths) // C)
    table_BM = rng.integers(-(2**31), 2**31, (len(used_B), columns)).astype(np.int32)
    table_BM[np.arange(columns) < used_B[:, None]] = rng.permutation(int(used_B.sum())).astype(np.int32)
    return table_BM
