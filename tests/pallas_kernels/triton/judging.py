"""How the results of both Triton kernels are judged, and how they are lowered where there is no GPU."""

import subprocess
import sys

import numpy as np

from tests.pallas_kernels import ref64, scenes

LIMIT = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 1e-2}
INT8_LIMIT = 3e-2  # against what was never 8 bits wide; float8 has 3 bits of mantissa and no such limit


def draw_sinks(rng, N):
    return rng.normal(size=N).astype(np.float32)


def check(found, q_TNH, k_PKCH, v_PKCH, rows, base, *, limit, window=None, **meaning):
    """Compare outputs and logs of masses with float64, for the tokens that have a row."""
    o_TNH, lse_TN = (np.asarray(part, np.float64) for part in found)
    ref_TNH, ref_lse_TN = ref64.attention_with_lse(q_TNH, k_PKCH, v_PKCH, rows, base=base, window=window, **meaning)
    live_T = (ref_lse_TN > -np.inf).all(axis=1)
    assert live_T.any()
    assert scenes.relative_error(o_TNH[live_T], ref_TNH[live_T]) <= limit
    np.testing.assert_allclose(lse_TN[live_T], ref_lse_TN[live_T], rtol=0, atol=limit)


LOWER = """
import contextlib, itertools
import jax
from jax.sharding import AbstractMesh, AxisType
from pallas_kernels.pools import Scaled
from pallas_kernels.rows import Rows
from pallas_kernels.shape import Shape
from pallas_kernels.target import Target
from pallas_kernels.triton import chunks, decode, form
S = jax.ShapeDtypeStruct
target = Target("cuda", 80, 108, "NVIDIA A100-SXM4-80GB")
gpu = contextlib.nullcontext()
if jax.__version_info__ >= (0, 11):  # since then Pallas wants to know the GPU
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA A100-SXM4-80GB", num_cores=108, platform="gpu")
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)
    gpu = jax.sharding.use_abstract_mesh(mesh)
B, M, P, T, K = 4, 9, 100, 64, 2
odd = itertools.cycle([
    ("bfloat16", "bfloat16", 64, None, None), ("float16", "float16", 16, 40, None),
    ("bfloat16", "int8", 64, 40, 30.0), ("bfloat16", "float8_e4m3fn", 128, None, 50.0),
])
for H, G, (dtype, pool_dtype, C, window, soft_cap) in zip(form.HEAD_WIDTHS, (4, 1, 7, 20, 8, 2), odd):
    assert KERNEL.unserved(target, Shape(G, H, C, dtype, pool_dtype)) is None
    k = v = S((P, K, C, H), pool_dtype)
    if pool_dtype in form.EIGHT_BITS:
        scales_PKC = S((P, K, C), "float32")
        k, v = Scaled(k, scales_PKC), Scaled(S((P, K, H, C), pool_dtype), scales_PKC)
    meaning = {"scale": 0.1, "window": window, "soft_cap": soft_cap, "target": target}
    line_B, table_BM, base = S((B,), "int32"), S((B, M), "int32"), S((), "int32")
    if KERNEL is decode:
        f = lambda q, k, v, t, l, b, s: decode.attend(q, k, v, t, l, base=b, sinks_N=s, **meaning)
        operands = S((B, K * G, H), dtype), k, v, table_BM, line_B, base
    else:
        f = lambda q, k, v, rows, b, s: chunks.attend(q, k, v, rows, base=b, sinks_N=s, **meaning)
        operands = S((T, K * G, H), dtype), k, v, Rows(line_B, line_B, line_B, table_BM), base
    with gpu:
        lowered = jax.jit(f).trace(*operands, S((K * G,), "float32")).lower(lowering_platforms=("cuda",))
    assert "__gpu$xla.gpu.triton" in lowered.as_text(), lowered.as_text()[-2000:]
print("lowered")
"""


def check_lowering(kernel):
    """For CUDA, in a process of its own, because the compiler aborts instead of raising."""
    code = LOWER.replace("KERNEL", kernel)
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert ran.stdout == "lowered\n", ran.stderr[-2000:]
