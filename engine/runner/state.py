"""What a lane keeps on its devices between steps, and how it is made and loaded.

    k, v             KV of all layers, layer l of block b at l * P + b; split over K on mesh axis kv
    history_RS       every token of every row, int32, replicated
    table_RM         block table of every row, int32, replicated
    draws            sampling record of every row, replicated

A Load packs one row: its number, its record, its table and its tokens, padded to one of a few lengths; `load_rows`
writes up to LOAD_ROWS of them. Rows at or past R are padding and dropped. bfloat16 pools are uint16 on CPU, where
XLA would widen a bfloat16 scatter; pools of 8 bits have scales (pallas_kernels/pools.py).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from engine.core.plan import Load
from engine.models.config import ModelConfig
from engine.runner.draws import BLANK, WIDTH, Draws, decode, encode, store
from pallas_kernels.pools import SCALE_BYTES, Pool, Scaled

LOAD_ROWS = 8
MOST_LOADS = 4  # programs that load rows, by length
SHORTEST_LOAD = 64


class State(NamedTuple):
    """Device arrays of a lane; donated to every program and replaced by its result."""

    k: Pool
    v: Pool
    history_RS: jax.Array
    table_RM: jax.Array


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes of one lane's device state."""

    num_blocks: int
    block_size: int
    max_rows: int
    max_length: int
    kv_dtype: str | None = None  # of 8-bit pools; None: that of the weights

    @property
    def table_width(self) -> int:
        return -(-self.max_length // self.block_size)


POOL = PartitionSpec(None, "kv")
STATE = State(POOL, POOL, PartitionSpec(), PartitionSpec())


def pool_dtype(dtype: np.dtype, platform: str, kv_dtype: str | None = None) -> np.dtype:
    """The dtype that holds KV of `dtype` on `platform`, or the numbers of 8-bit pools."""
    if kv_dtype is not None:
        return np.dtype(jnp.dtype(kv_dtype))
    return np.dtype(np.uint16) if platform == "cpu" and dtype == jnp.bfloat16 else np.dtype(dtype)


def head_bytes(width: int, held: np.dtype) -> int:
    """Bytes of the keys of one head and position, with the scale of 8-bit numbers."""
    return width * held.itemsize + (SCALE_BYTES if held.itemsize == 1 else 0)


def pools(shape: tuple[int, ...], held: np.dtype, array: Callable[..., jax.Array]) -> tuple[Pool, Pool]:
    """Keys and values, each array made by array(shape, dtype); `shape` is [P, K, C, H]."""
    if held.itemsize > 1:
        return array(shape, held), array(shape, held)
    turned = (*shape[:2], shape[3], shape[2])
    return tuple(Scaled(array(each, held), array(shape[:3], np.float32)) for each in (shape, turned))


def empty_state(config: ModelConfig, sizes: Sizes, mesh: Mesh, dtype: np.dtype) -> State:
    """Zeros everywhere, made on the devices."""
    shape = (config.num_layers * sizes.num_blocks, config.kv_heads, sizes.block_size, config.head_width)
    held = pool_dtype(dtype, mesh.devices.flat[0].platform, sizes.kv_dtype)
    lines = (sizes.max_rows, sizes.max_length), (sizes.max_rows, sizes.table_width)
    program = jax.jit(_zeros, static_argnums=(0, 1, 2), out_shardings=shardings(mesh, STATE))
    return program(shape, held, lines)


def _zeros(shape: tuple[int, ...], dtype: np.dtype, lines: tuple[tuple[int, int], ...]) -> State:
    """A function of the module, so that JAX knows its program when the state is made anew."""
    return State(*pools(shape, dtype, jnp.zeros), *(jnp.zeros(line, jnp.int32) for line in lines))


def empty_draws(sizes: Sizes, mesh: Mesh) -> Draws:
    """The records of empty rows."""
    packed = np.tile(encode(BLANK), (sizes.max_rows, 1))
    return jax.jit(decode, out_shardings=NamedSharding(mesh, PartitionSpec()))(packed)


def shardings(mesh: Mesh, specs):
    """NamedShardings for a tree of PartitionSpecs; the spec of a pool is that of all its arrays."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)


def load_lengths(max_length: int) -> tuple[int, ...]:
    """Padded lengths of loads, each a program; the last holds any sequence."""
    lengths = [max_length]
    while len(lengths) < MOST_LOADS and lengths[-1] > SHORTEST_LOAD:
        lengths.append(max(lengths[-1] // 4, SHORTEST_LOAD))
    return tuple(sorted(lengths))


def pack_loads(loads: Sequence[Load], sizes: Sizes, length: int) -> np.ndarray:
    """int32 [LOAD_ROWS, 1 + record + table + length]; at most LOAD_ROWS loads of at most `length` tokens."""
    packed = np.zeros((LOAD_ROWS, 1 + WIDTH + sizes.table_width + length), np.int32)
    packed[:, 0] = sizes.max_rows
    for line, load in zip(packed, loads, strict=False):
        line[0] = load.row
        line[1 : 1 + WIDTH] = encode(load.draw)
        line[1 + WIDTH : 1 + WIDTH + len(load.blocks)] = load.blocks
        start = 1 + WIDTH + sizes.table_width
        line[start : start + len(load.tokens)] = load.tokens
    return packed


def load_rows(sizes: Sizes, state: State, draws: Draws, packed: jax.Array) -> tuple[State, Draws]:
    """`state` and `draws` with packed loads in their rows; pure, for use inside jit."""
    row_L = packed[:, 0]
    record, table, tokens = jnp.split(packed[:, 1:], [WIDTH, WIDTH + sizes.table_width], axis=1)
    history_RS = state.history_RS.at[row_L, : tokens.shape[1]].set(tokens, mode="drop")
    table_RM = state.table_RM.at[row_L].set(table, mode="drop")
    return state._replace(history_RS=history_RS, table_RM=table_RM), store(draws, row_L, record)
