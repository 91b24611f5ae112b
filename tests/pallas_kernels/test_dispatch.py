"""Who serves what, and that choosing asks no device."""

import subprocess
import sys
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch
from pallas_kernels.dispatch import Shape, Target, attention, choose, parts, platform_of, target_of
from pallas_kernels.pools import Scaled
from pallas_kernels.target import H200
from tests.pallas_kernels import scenes

SERVED = Shape(group=4, head_width=128, block=64, dtype="bfloat16", pool_dtype="bfloat16")


@pytest.mark.parametrize("part", ["decode", "chunks", "ordered"])
@pytest.mark.parametrize("platform", ["cpu", "tpu", "rocm", "gpu", "something new"])
def test_other_platforms_than_cuda_get_xla_with_the_reason(part, platform):
    choice = choose(part, Target(platform), SERVED)
    assert choice.name == "xla" and platform in choice.reason


def test_the_first_kernel_that_serves_the_shape_is_chosen_and_the_others_say_why_not(monkeypatch):
    def kernel(reason):
        return SimpleNamespace(unserved=lambda target, shape: reason)

    monkeypatch.setitem(dispatch.KERNELS, "decode", (("mosaic", kernel("odd")), ("triton", kernel(None))))
    assert choose("decode", H200, SERVED) == ("decode", "triton", "mosaic: odd")
    monkeypatch.setitem(dispatch.KERNELS, "decode", (("mosaic", kernel("odd")), ("triton", kernel("even"))))
    assert choose("decode", H200, SERVED) == ("decode", "xla", "mosaic: odd; triton: even")


def test_a_step_is_served_in_parts():
    assert parts("invariant", one_token=True) == parts("invariant", one_token=False) == ("ordered",)
    assert parts("fast", one_token=True) == ("decode",)
    assert parts("fast", one_token=False) == ("decode", "chunks")


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


def test_a_target_is_what_the_driver_says():
    device = SimpleNamespace(platform="gpu", device_kind="NVIDIA H200", compute_capability="9.0", core_count=132)
    assert target_of(device) == H200
    assert target_of(SimpleNamespace(platform="gpu", device_kind="AMD X")) == Target("rocm", kind="AMD X")


def test_arrays_that_do_not_belong_together_are_refused():
    q_TNH, k_PKCH, v_PKCH, rows, base = scenes.scene(np.random.default_rng(0), spans=[(0, 3)], N=4, K=2, H=32, C=16)
    shared = {"base": base, "scale": 0.2, "window": None, "numerics": "fast", "one_token": False}
    for wrong in (q_TNH[:, :3], q_TNH[:, :, :16]):
        with pytest.raises(ValueError, match="expected TNH, PKCH, PKCH"):
            attention(wrong, k_PKCH, v_PKCH, rows, **shared)
    narrow = Scaled(jnp.zeros(k_PKCH.shape, jnp.int8), jnp.ones(k_PKCH.shape[:3]))
    with pytest.raises(ValueError, match="PKHC for values of 8 bits"):
        attention(q_TNH, narrow, narrow, rows, **shared)


def test_importing_starts_no_backend():
    code = (
        "import pallas_kernels.dispatch; from jax._src import xla_bridge; "
        "print(xla_bridge.backends_are_initialized())"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert ran.stdout == "False\n", ran.stderr[-2000:]
