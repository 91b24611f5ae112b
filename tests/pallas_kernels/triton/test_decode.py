"""The Triton kernel: interpreted against float64, and lowered for CUDA where there is no GPU."""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.triton import decode
from tests.pallas_kernels import ref64, scenes

LIMIT = {"float32": 1e-5, "bfloat16": 1e-2}


@functools.partial(jax.jit, static_argnames=("window",))
def interpreted(q_BNH, k_PKCH, v_PKCH, rows, base, *, window):
    lengths_B = jnp.where(rows.count_B > 0, rows.start_B + 1, 0)
    shared = {"base": base, "scale": 0.2, "window": window, "interpret": True}
    return decode.attend(q_BNH, k_PKCH, v_PKCH, rows.table_BM, lengths_B, **shared)


def error(drawn, window):
    q_BNH, k_PKCH, v_PKCH, rows, base = drawn
    o_BNH = interpreted(q_BNH, k_PKCH, v_PKCH, rows, base, window=window)
    return scenes.relative_error(
        o_BNH, ref64.attention(q_BNH, k_PKCH, v_PKCH, rows, base=base, scale=0.2, window=window)
    )


@pytest.mark.parametrize("dtype, window", [("float32", None), ("float32", 20), ("bfloat16", None)])
def test_the_interpreted_kernel_agrees_with_float64(dtype, window):
    rng = np.random.default_rng(0)
    lengths = [0, 1, 15, 16, 63, 64, 65, 0, 150]
    drawn = scenes.one_token_scene(rng, lengths=lengths, N=4, K=2, H=32, C=16, dtype=dtype)
    assert error(drawn, window) <= LIMIT[dtype]


def test_one_split_of_many_tiles_agrees_with_float64(monkeypatch):
    monkeypatch.setattr(decode, "PROGRAMS", 1)
    drawn = scenes.one_token_scene(np.random.default_rng(1), lengths=[200, 0, 333], N=4, K=2, H=32, C=16)
    assert error(drawn, None) <= 1e-5


def test_more_query_heads_than_a_dot_needs_and_long_blocks_agree_with_float64():
    drawn = scenes.one_token_scene(np.random.default_rng(1), lengths=[129, 128, 3], N=20, K=1, H=32, C=128)
    assert error(drawn, None) <= 1e-5


def test_shapes_without_a_kernel_are_refused():
    drawn = scenes.one_token_scene(np.random.default_rng(3), lengths=[5], N=1, K=1, H=80, C=16)
    with pytest.raises(ValueError, match="got 80 and 16"):
        error(drawn, None)


LOWER = """
import contextlib
import jax
from jax.sharding import AbstractMesh, AxisType
from pallas_kernels.dispatch import Rows, attention
S = jax.ShapeDtypeStruct
B, M, P = 4, 9, 100
target = contextlib.nullcontext()
if jax.__version_info__ >= (0, 11):  # since then Pallas wants to know the GPU
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)
    target = jax.sharding.use_abstract_mesh(mesh)
rows = Rows(*[S((B,), "int32")] * 3, S((B, M), "int32"))
for N, K, H, C, dtype, window in (
    (32, 8, 128, 64, "bfloat16", None), (4, 2, 64, 16, "float32", 40), (8, 1, 256, 128, "float16", None),
):
    def f(q, k, v, rows):
        chosen = {"numerics": "fast", "one_token": True, "platform": "cuda"}
        return attention(q, k, v, rows, base=7, scale=0.1, window=window, **chosen)
    pool = S((P, K, C, H), dtype)
    with target:
        lowered = jax.jit(f).trace(S((B, N, H), dtype), pool, pool, rows).lower(lowering_platforms=("cuda",))
    assert "__gpu$xla.gpu.triton" in lowered.as_text(), lowered.as_text()[-2000:]
print("lowered")
"""


def test_the_kernel_lowers_for_cuda_on_a_machine_without_a_gpu():
    """In a process of its own, because the compiler aborts instead of raising."""
    ran = subprocess.run([sys.executable, "-c", LOWER], capture_output=True, text=True, timeout=120, check=False)
    assert ran.stdout == "lowered\n", ran.stderr[-2000:]
