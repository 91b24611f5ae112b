"""Writing keys and values: the right places, dropped tokens, and never a second pool."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.dispatch import write_kv
from tests.pallas_kernels import ref64, scenes

KINDS = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_go_to_their_slots_and_those_past_the_pool_are_dropped(kind):
    rng = np.random.default_rng(0)
    P, K, C, H, T = 6, 2, 16, 32, 7
    k_PKCH, v_PKCH = (rng.normal(size=(P, K, C, H)).astype(KINDS[kind]) for _ in range(2))
    k_TKH, v_TKH = (rng.normal(size=(T, K, H)).astype(KINDS[kind]) for _ in range(2))
    slots_T = np.array([0, 5, 5, 6, 2, 2**31 - 1, 3], np.int32)
    offsets_T = np.array([0, 15, 3, 1, 9, 0, 2], np.int32)
    expected = ref64.write_kv(k_PKCH, v_PKCH, k_TKH, v_TKH, slots_T, offsets_T)
    pools = [scenes.stored(pool) for pool in (k_PKCH, v_PKCH)]
    written = jax.jit(write_kv)(*pools, k_TKH, v_TKH, slots_T, offsets_T)
    for got, want in zip(written, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(got), scenes.stored(want))


def test_float32_tokens_are_rounded_to_the_kind_of_the_pool():
    new_TKH = np.full((1, 1, 32), 1 + 2**-9, np.float32)
    pool = jnp.zeros((2, 1, 16, 32), jnp.uint16)
    k_PKCH, _ = write_kv(pool, pool, new_TKH, new_TKH, np.array([1]), np.array([4]))
    np.testing.assert_array_equal(
        np.asarray(k_PKCH)[1, 0, 4], new_TKH[0, 0].astype(ml_dtypes.bfloat16).view(np.uint16)
    )


@pytest.mark.parametrize("kind", ["float32", "float16", "uint16"])
def test_a_donated_pool_is_written_in_place(kind):
    P, K, C, H, T = 4096, 2, 16, 32, 16
    pool = jax.ShapeDtypeStruct((P, K, C, H), kind)
    new_TKH = jax.ShapeDtypeStruct((T, K, H), "float32")
    places_T = jax.ShapeDtypeStruct((T,), "int32")
    compiled = (
        jax.jit(write_kv, donate_argnums=(0, 1)).lower(pool, pool, new_TKH, new_TKH, places_T, places_T).compile()
    )
    pool_bytes = P * K * C * H * np.dtype(kind).itemsize
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < pool_bytes / 50
    assert memory.alias_size_in_bytes == 2 * pool_bytes
