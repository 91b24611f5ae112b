"""What is served, and by what: the shapes for which every kernel must lower, compile and keep its registers.

    Row(model, tokens, ...) --program--> a jitted attention and the shapes of its arguments
                            --kernels--> who serves each part of the step, by `dispatch`

    tokens  rows    the step
    T       0       decode: T rows of one token each
    T       B       mixed: T tokens in at most B rows, chunks of prompts and single tokens together

A row differs from the usual step (bfloat16, blocks of 64, tables of 128 blocks, an H200) only in what it names. The
sizes are those of one device: a model split over eight is a row with an eighth of its heads.
`python -m bench ahead` compiles every row, tests/pallas_kernels/compiled.json holds what came of it.
Source: the config.json of the models.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import Choice, Numerics, attention, choose, parts
from pallas_kernels.pools import Pool, Scaled
from pallas_kernels.rows import Rows
from pallas_kernels.shape import Shape
from pallas_kernels.target import H200, Target


class Model(NamedTuple):
    """The attention of one layer, as one device has it."""

    heads: int
    kv_heads: int
    head_width: int
    window: int | None = None
    soft_cap: float | None = None
    sinks: bool = False


MODELS = {
    "llama-8b": Model(32, 8, 128),
    "llama-70b/8": Model(8, 1, 128),
    "qwen3-0.6b": Model(16, 8, 128),
    "qwen2-0.5b": Model(14, 2, 64),
    "gemma-2-9b": Model(16, 8, 256, window=4096, soft_cap=50.0),
    "gpt-oss-20b": Model(64, 8, 64, window=128, sinks=True),
    "phi-3-mini": Model(32, 32, 96),
    "phi-2": Model(32, 32, 80),
}
TARGETS = {
    "h200": H200,
    "a100": Target("cuda", 80, 108, "NVIDIA A100-SXM4-80GB"),
    "b200": Target("cuda", 100, 148, "NVIDIA B200"),
    "v5e": Target("tpu", kind="TPU v5e"),
}


class Row(NamedTuple):
    """One shape, and who serves it: a name, or one for each part of the step."""

    by: str
    model: str
    tokens: int
    rows: int = 0
    block: int = 64
    columns: int = 128  # blocks of a row's table
    dtype: str = "bfloat16"
    pool: str = ""  # dtype of the pool where it is not that of the queries
    blocks: int = 8192  # of the pool
    numerics: Numerics = "fast"
    target: str = "h200"

    @property
    def name(self) -> str:
        """What sets the row apart, in words."""
        usual = self._field_defaults
        shown = {"block": "C{}", "columns": "M{}", "dtype": "{}", "pool": "{}", "blocks": "P{}"}
        shown |= {"numerics": "{}", "target": "{}"}
        odd = [words.format(getattr(self, f)) for f, words in shown.items() if getattr(self, f) != usual[f]]
        return " ".join([self.model, "mixed" if self.rows else "decode", str(self.tokens), *odd])

    @property
    def parts(self) -> tuple[str, ...]:
        """Who serves each part, in the order of `dispatch.parts`."""
        named = tuple(self.by.split(", "))
        return named * (len(parts(self.numerics, not self.rows)) // len(named))


SERVED = (
    # by       model          T     B
    Row("mosaic", "llama-8b", 1),
    Row("mosaic", "llama-8b", 8),
    Row("mosaic", "llama-8b", 64),
    Row("mosaic", "llama-8b", 256),
    Row("mosaic", "llama-8b", 8, columns=512),
    Row("mosaic", "llama-8b", 64, block=16, columns=512),
    Row("mosaic", "llama-8b", 64, block=128, columns=64),
    Row("mosaic", "llama-8b", 64, dtype="float16"),
    Row("xla", "llama-8b", 64, dtype="float32"),
    Row("mosaic", "llama-8b", 64, pool="int8"),
    Row("mosaic", "llama-8b", 64, pool="float8_e4m3fn"),
    Row("mosaic", "llama-8b", 64, numerics="invariant"),
    Row("mosaic", "llama-70b/8", 64, blocks=80 * 8192),  # 80 layers: more than 2^32 numbers
    Row("mosaic", "llama-70b/8", 256),
    Row("mosaic", "llama-70b/8", 64, numerics="invariant"),
    Row("mosaic", "qwen3-0.6b", 64),
    Row("mosaic", "qwen2-0.5b", 64),
    Row("mosaic", "gemma-2-9b", 64),
    Row("mosaic", "gpt-oss-20b", 64),
    Row("mosaic", "phi-3-mini", 64),
    Row("mosaic", "phi-2", 64),
    Row("triton", "llama-8b", 64, target="a100"),
    Row("triton", "llama-8b", 64, target="b200"),
    Row("mosaic", "llama-8b", 512, 64),
    Row("mosaic", "llama-8b", 2048, 64),
    Row("mosaic", "llama-8b", 8192, 8),
    Row("mosaic", "llama-8b", 2048, 64, block=16, columns=512),
    Row("mosaic", "llama-8b", 2048, 64, dtype="float16"),
    Row("xla", "llama-8b", 512, 64, dtype="float32"),
    Row("mosaic, triton", "llama-8b", 2048, 64, pool="int8"),
    Row("mosaic, triton", "llama-8b", 2048, 64, pool="float8_e4m3fn"),
    Row("mosaic", "llama-8b", 2048, 64, numerics="invariant"),
    Row("mosaic", "llama-70b/8", 2048, 64, blocks=80 * 8192),
    Row("mosaic", "qwen3-0.6b", 2048, 64),
    Row("mosaic", "qwen2-0.5b", 512, 64),
    Row("mosaic", "gemma-2-9b", 2048, 64),
    Row("mosaic", "gpt-oss-20b", 2048, 64),
    Row("mosaic", "phi-3-mini", 512, 64),
    Row("mosaic", "phi-2", 512, 64),
    Row("triton", "llama-8b", 2048, 64, target="a100"),
)


def kernels(row: Row) -> tuple[Choice, ...]:
    """What the dispatcher says of each part of the row's step."""
    model = MODELS[row.model]
    group = model.heads // model.kv_heads
    size = row.blocks * model.kv_heads * row.block * model.head_width
    shape = Shape(group, model.head_width, row.block, row.dtype, row.pool or row.dtype, size)
    return tuple(choose(part, TARGETS[row.target], shape) for part in parts(row.numerics, not row.rows))


def program(row: Row) -> tuple[Callable, tuple]:
    """A jitted attention of the row's step, and the shapes of its arguments."""
    model = MODELS[row.model]

    def attend(q_TNH: jax.Array, k: Pool, v: Pool, rows: Rows, base: jax.Array, sinks_N: jax.Array | None):
        return attention(
            q_TNH,
            k,
            v,
            rows,
            base=base,
            scale=model.head_width**-0.5,
            window=model.window,
            soft_cap=model.soft_cap,
            sinks_N=sinks_N,
            numerics=row.numerics,
            one_token=not row.rows,
            target=TARGETS[row.target],
        )

    attend.__name__ = re.sub(r"\W", "_", row.name)
    B = row.rows or row.tokens
    line_B = jax.ShapeDtypeStruct((B,), jnp.int32)
    rows = Rows(line_B, line_B, line_B, jax.ShapeDtypeStruct((B, row.columns), jnp.int32))
    q_TNH = jax.ShapeDtypeStruct((row.tokens, model.heads, model.head_width), row.dtype)
    sinks_N = jax.ShapeDtypeStruct((model.heads,), jnp.float32) if model.sinks else None
    return jax.jit(attend), (q_TNH, *_pools(row), rows, jax.ShapeDtypeStruct((), jnp.int32), sinks_N)


def _pools(row: Row) -> tuple[Pool, Pool]:
    model, dtype = MODELS[row.model], row.pool or row.dtype
    sizes = (row.blocks, model.kv_heads, row.block, model.head_width)
    k_PKCH = jax.ShapeDtypeStruct(sizes, dtype)
    if not row.pool:
        return k_PKCH, k_PKCH
    scales_PKC = jax.ShapeDtypeStruct(sizes[:3], jnp.float32)
    v_PKHC = jax.ShapeDtypeStruct((*sizes[:2], model.head_width, row.block), dtype)
    return Scaled(k_PKCH, scales_PKC), Scaled(v_PKHC, scales_PKC)
