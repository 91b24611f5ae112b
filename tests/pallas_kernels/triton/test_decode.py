"""The Triton kernel for single tokens: interpreted against float64, and lowered for CUDA where there is no GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.shape import Shape
from pallas_kernels.target import H200, Target
from pallas_kernels.triton import decode
from tests.pallas_kernels import scenes
from tests.pallas_kernels.triton import judging

LENGTHS = [0, 1, 15, 16, 63, 64, 65, 0, 150]
SCALE = 0.2


@functools.partial(jax.jit, static_argnames=("window", "soft_cap", "config"))
def interpreted(q_BNH, k, v, rows, base, sinks_N, *, window=None, soft_cap=None, config=None):
    lengths_B = jnp.where(rows.count_B > 0, rows.start_B + 1, 0)
    meaning = {"scale": SCALE, "window": window, "soft_cap": soft_cap, "sinks_N": sinks_N, "config": config}
    return decode.attend(q_BNH, k, v, rows.table_BM, lengths_B, base=base, interpret=True, **meaning)


def check(drawn, sinks_N=None, limit=1e-5, config=None, **meaning):
    found = interpreted(*drawn, sinks_N, config=config, **meaning)
    judging.check(found, *drawn, limit=limit, scale=SCALE, sinks_N=sinks_N, **meaning)


@pytest.mark.parametrize(
    "H, N, K, C, dtype, sinks, meaning",
    [
        (32, 4, 2, 16, "float32", False, {}),
        (64, 1, 1, 32, "float32", False, {"window": 20}),
        (80, 6, 2, 64, "float32", True, {"soft_cap": 3.0}),
        (96, 20, 1, 128, "float32", True, {"window": 64}),
        (128, 14, 2, 16, "bfloat16", False, {"window": 100, "soft_cap": 3.0}),
        (256, 16, 2, 64, "bfloat16", True, {}),
        (64, 8, 1, 128, "float16", False, {}),
    ],
)
def test_the_interpreted_kernel_agrees_with_float64(H, N, K, C, dtype, sinks, meaning):
    rng = np.random.default_rng(H)
    drawn = scenes.one_token_scene(rng, lengths=LENGTHS, N=N, K=K, H=H, C=C, dtype=dtype)
    check(drawn, judging.draw_sinks(rng, N) if sinks else None, judging.LIMIT[dtype], **meaning)


@pytest.mark.parametrize("kind", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize("dtype, limit", [("float32", 1e-5), ("bfloat16", 1e-2), ("float16", 1e-2)])
def test_8_bit_pools_agree_with_the_numbers_they_stand_for(kind, dtype, limit):
    rng = np.random.default_rng(2)
    q_BNH, k_PKCH, v_PKCH, rows, base = scenes.one_token_scene(
        rng, lengths=LENGTHS, N=6, K=2, H=80, C=64, dtype=dtype
    )
    k, v, k_meant_PKCH, v_meant_PKCH = scenes.scaled(k_PKCH, v_PKCH, kind)
    found = interpreted(q_BNH, k, v, rows, base, None, window=70)
    meaning = {"scale": SCALE, "window": 70}
    judging.check(found, q_BNH, k_meant_PKCH, v_meant_PKCH, rows, base, limit=limit, **meaning)
    if kind == "int8":
        judging.check(found, q_BNH, k_PKCH, v_PKCH, rows, base, limit=judging.INT8_LIMIT, **meaning)


@pytest.mark.parametrize("sinks", [False, True])
def test_rows_that_see_nothing_give_0_and_no_mass(sinks):
    rng = np.random.default_rng(3)
    drawn = scenes.one_token_scene(rng, lengths=[0, 5], N=4, K=2, H=32, C=16)
    o_BNH, lse_BN = interpreted(*drawn, judging.draw_sinks(rng, 4) if sinks else None)
    assert not np.asarray(o_BNH)[0].any() and np.asarray(o_BNH)[1].any()
    assert (np.asarray(lse_BN)[0] == -np.inf).all() and np.isfinite(np.asarray(lse_BN)[1]).all()


@pytest.mark.parametrize("splits", [1, 5, 40])
def test_any_number_of_splits_and_tiles_shorter_than_blocks_agree_with_float64(splits):
    drawn = scenes.one_token_scene(np.random.default_rng(1), lengths=[200, 0, 700], N=4, K=2, H=32, C=64)
    check(drawn, config=decode.Config(tile=32, splits=splits))


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), lengths=st.lists(st.integers(0, 160), min_size=4, max_size=4).filter(any))
def test_any_lengths_agree_with_float64(seed, lengths):
    sizes = {"N": 2, "K": 1, "H": 32, "C": 16, "num_blocks": 50, "columns": 10}
    check(scenes.one_token_scene(np.random.default_rng(seed), lengths=lengths, **sizes), window=30)


def test_two_rows_may_share_blocks():
    q_BNH, k_PKCH, v_PKCH, rows, base = scenes.one_token_scene(
        np.random.default_rng(4), lengths=[100, 90], N=4, K=2, H=32, C=16
    )
    rows.table_BM[1, :5] = rows.table_BM[0, :5]
    check((q_BNH, k_PKCH, v_PKCH, rows, base))


def test_there_are_as_many_programs_as_cores_can_use():
    q_BNH, k_PKCH = (
        jax.ShapeDtypeStruct((2, 32, 128), "bfloat16"),
        jax.ShapeDtypeStruct((9, 8, 64, 128), "bfloat16"),
    )
    small, large = (decode.rule(Target("cuda", 80, cores), q_BNH, k_PKCH, 1000).splits for cores in (28, 112))
    assert (small, large) == (7, 28)
    assert decode.rule(H200, q_BNH, k_PKCH, 3).splits == 3  # one for each tile


@pytest.mark.parametrize(
    "odd, word",
    [
        ({"head_width": 48}, "48"),
        ({"block": 48}, "48"),
        ({"group": 65}, "65"),
        ({"dtype": "float32"}, "float32"),
        ({"pool_dtype": "uint16"}, "uint16"),
        ({"pool_dtype": "int8", "block": 32}, "32"),
        ({"pool_dtype": "int8", "pool_size": 3 << 30}, "3221225472"),
    ],
)
def test_what_the_kernel_cannot_serve_is_named(odd, word):
    served = {"group": 4, "head_width": 128, "block": 64, "dtype": "bfloat16", "pool_dtype": "bfloat16"}
    assert decode.unserved(H200, Shape(**served)) is None
    assert word in decode.unserved(H200, Shape(**{**served, **odd}))


@pytest.mark.parametrize("target, word", [(Target("rocm"), "rocm"), (Target("cuda", 75), "7.5")])
def test_what_is_no_recent_nvidia_gpu_is_named(target, word):
    assert word in decode.unserved(target, Shape(4, 128, 64, "bfloat16", "bfloat16"))


def test_the_kernel_lowers_for_cuda_on_a_machine_without_a_gpu():
    judging.check_lowering("decode")
