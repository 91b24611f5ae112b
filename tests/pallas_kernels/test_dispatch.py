"""Who serves what, and that choosing asks no device."""

import subprocess
import sys
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.dispatch import attention, choose, platform_of
from tests.pallas_kernels import scenes

SERVED = {"one_token": True, "head_width": 128, "block": 64, "pool_dtype": jnp.bfloat16}


def test_the_kernel_serves_single_tokens_on_nvidia_alone():
    assert choose("cuda", "fast", **SERVED).name == "decode_triton"
    for platform in ("cpu", "tpu", "rocm", "gpu", "something new"):
        choice = choose(platform, "fast", **SERVED)
        assert choice.name == "ragged" and platform in choice.reason


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_invariant_numerics_never_get_a_kernel(platform):
    assert choose(platform, "invariant", **SERVED).name == "ordered"


@pytest.mark.parametrize(
    "odd, word",
    [
        ({"one_token": False}, "several tokens"),
        ({"head_width": 80}, "80"),
        ({"block": 48}, "48"),
        ({"pool_dtype": jnp.uint16}, "uint16"),
    ],
)
def test_what_the_kernel_cannot_serve_is_named(odd, word):
    choice = choose("cuda", "fast", **{**SERVED, **odd})
    assert choice.name == "ragged" and word in choice.reason


@pytest.mark.parametrize(
    "platform, kind, name",
    [
        ("cpu", "cpu", "cpu"),
        ("gpu", "NVIDIA H200", "cuda"),
        ("gpu", "AMD Instinct MI300X", "rocm"),
        ("gpu", "?", "gpu"),
        ("tpu", "TPU v5e", "tpu"),
    ],
)
def test_devices_are_told_apart_by_their_kind(platform, kind, name):
    assert platform_of(SimpleNamespace(platform=platform, device_kind=kind)) == name


def test_arrays_that_do_not_belong_together_are_refused():
    q_TNH, k_PKCH, v_PKCH, rows, base = scenes.scene(np.random.default_rng(0), spans=[(0, 3)], N=4, K=2, H=32, C=16)
    shared = {"base": base, "scale": 0.2, "window": None, "numerics": "fast", "one_token": False}
    for wrong in (q_TNH[:, :3], q_TNH[:, :, :16]):
        with pytest.raises(ValueError, match="expected TNH, PKCH, PKCH"):
            attention(wrong, k_PKCH, v_PKCH, rows, **shared)


def test_importing_starts_no_backend():
    code = (
        "import pallas_kernels.dispatch; from jax._src import xla_bridge; "
        "print(xla_bridge.backends_are_initialized())"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert ran.stdout == "False\n", ran.stderr[-2000:]
