"""The best library call in JAX beside our kernels, in the same run: attention of contiguous keys and values.

    jax.nn.dot_product_attention(implementation="cudnn")     decode: all keys, or lengths; prefill: causal

It reads no blocks, so it stands for what a kernel without paging does. A chunk after a prefix is not among its
masks, 8-bit keys are not among its dtypes. On a machine without a GPU the plain XLA implementation takes its place.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp

from bench.kernels_cases import Case, Decode, Prefill
from bench.kernels_process import Row
from bench.kernels_speed import MEMORY_SHARE, figures, moved_bytes
from bench.kernels_time import chains, slope


def unserved(case: Case) -> str | None:
    """Why the library cannot compute the case."""
    if case.pool != "bfloat16":
        return f"keys of {case.pool} are not served"
    if isinstance(case, Prefill) and case.prefix:
        return "a chunk after a prefix is no mask of its"
    return None


def measure(case: Case, implementation: str, memory_bytes: int) -> Iterator[Row]:
    """Rows of figures, one for each context."""
    every = case.contexts if isinstance(case, Decode) else (case.longest,)
    for context in every:
        if moved_bytes(case, context) > MEMORY_SHARE * memory_bytes:
            yield {"context": context, "skipped": "does not fit the memory"}
        else:
            yield {"context": context, **figures(case, context, _seconds(case, context, implementation))}


def _seconds(case: Case, context: int, implementation: str) -> float:
    heads = case.heads
    decode = isinstance(case, Decode)
    ragged = decode and case.ragged
    B, T = (case.batch, 1) if decode else (1, case.tokens)
    lengths_B = jnp.asarray(case.lengths(context) if decode else [context], jnp.int32)
    S = case.longest if ragged else context
    q_BTNH, k_BSKH, v_BSKH = (
        jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)
        for seed, shape in enumerate([(B, T, heads.N, heads.H), *2 * [(B, S, heads.K, heads.H)]])
    )

    def call(base: jax.Array, q_BTNH, k_BSKH, v_BSKH, lengths_B) -> tuple[jax.Array, jax.Array]:
        mask = {"key_value_seq_lengths": lengths_B} if ragged else {"is_causal": not decode}
        o_BTNH = jax.nn.dot_product_attention(
            q_BTNH + base.astype(q_BTNH.dtype), k_BSKH, v_BSKH, implementation=implementation, **mask
        )
        return o_BTNH, o_BTNH[0, 0]

    counts = (1, 5)
    arrays = (q_BTNH, k_BSKH, v_BSKH, lengths_B)
    return slope(chains(call, counts, 0, 1, arrays), counts)
