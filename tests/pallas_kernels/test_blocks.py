"""Writing keys and values: the right places, dropped tokens, and never a second pool."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.blocks import copy_blocks, write_kv
from pallas_kernels.pools import Scaled, keys_at, values_at
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


@pytest.mark.parametrize("kind, error", [("int8", 1 / 250), ("float8_e4m3fn", 1 / 16)])
def test_tokens_in_8_bits_stand_for_what_was_written(kind, error):
    rng = np.random.default_rng(1)
    P, K, C, H, T = 6, 2, 16, 32, 7
    new = [
        (10.0 ** rng.integers(-4, 4, size=(T, K, 1)) * rng.normal(size=(T, K, H))).astype(np.float32) for _ in "kv"
    ]
    new[1][3, 0] = 0
    slots_T, offsets_T = (
        np.array([0, 5, 5, 6, 2, 2**31 - 1, 3], np.int32),
        np.array([0, 15, 3, 1, 9, 0, 2], np.int32),
    )
    scales_PKC = jnp.ones((P, K, C))
    empty = Scaled(jnp.zeros((P, K, C, H), kind), scales_PKC), Scaled(jnp.zeros((P, K, H, C), kind), scales_PKC)
    k, v = jax.jit(write_kv)(*empty, *new, slots_T, offsets_T)
    zeros = np.zeros((P, K, C, H), np.float32)
    for got, want in zip(
        (keys_at(k, jnp.arange(P)), values_at(v, jnp.arange(P))),
        ref64.write_kv(zeros, zeros, *new, slots_T, offsets_T),
        strict=True,
    ):
        off = np.abs(np.asarray(got) - want).max(axis=-1)
        assert (off <= error * np.abs(want).max(axis=-1)).all() and (np.asarray(got)[1] == 0).all()


def test_blocks_are_copied_as_they_were_before_and_dropped_past_the_pool():
    rng = np.random.default_rng(2)
    numbers = jnp.asarray(rng.integers(-9, 9, size=(6, 2, 16, 32)), jnp.int8)
    scales = jnp.asarray(rng.normal(size=(6, 2, 16)), jnp.float32)
    pool = Scaled(numbers, scales)
    sources_X, targets_X = np.array([1, 2, 3, 1]), np.array([2, 1, 6, 5])
    k, v = jax.jit(copy_blocks)(pool, pool.numbers, sources_X, targets_X)
    want = np.array([0, 2, 1, 3, 4, 1])
    np.testing.assert_array_equal(k.numbers, numbers[want])
    np.testing.assert_array_equal(k.scales_PKC, scales[want])
    np.testing.assert_array_equal(v, numbers[want])


@pytest.mark.parametrize("kind", ["float32", "float16", "uint16", "int8"])
@pytest.mark.parametrize("program", [write_kv, copy_blocks])
def test_a_donated_pool_is_written_in_place(kind, program):
    P, K, C, H, T = 4096, 2, 16, 32, 16
    k = v = jax.ShapeDtypeStruct((P, K, C, H), kind)
    if kind == "int8":
        scales_PKC = jax.ShapeDtypeStruct((P, K, C), "float32")
        k, v = Scaled(k, scales_PKC), Scaled(jax.ShapeDtypeStruct((P, K, H, C), kind), scales_PKC)
    new_TKH = jax.ShapeDtypeStruct((T, K, H), "float32")
    places_T = jax.ShapeDtypeStruct((T,), "int32")
    arguments = (new_TKH, new_TKH, places_T, places_T) if program is write_kv else (places_T, places_T)
    memory = jax.jit(program, donate_argnums=(0, 1)).lower(k, v, *arguments).compile().memory_analysis()
    pool_bytes = sum(array.size * array.dtype.itemsize for array in jax.tree.leaves((k, v)))
    assert memory.temp_size_in_bytes < pool_bytes / 100
    assert memory.alias_size_in_bytes == pool_bytes
