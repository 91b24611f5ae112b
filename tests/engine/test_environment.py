"""What must stand in the environment before JAX starts."""

import pytest

from engine import environment
from engine.environment import needed
from engine.errors import ConfigError

FLAG = "--xla_force_host_platform_device_count"


@pytest.fixture(params=[True, False], ids=["gpu", "no-gpu"])
def has_gpu(request, monkeypatch):
    problem = None if request.param else "no NVIDIA driver here"
    monkeypatch.setattr(environment, "gpu_problem", lambda: problem)
    return request.param


def test_a_cpu_mesh_gets_as_many_virtual_devices(has_gpu):
    assert needed("cpu", "tp=8", {}) == {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{FLAG}=8"}
    assert needed("cpu", "dp=2,tp=3", {}) == {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{FLAG}=6"}
    for mesh in ("auto", "1", "tp=1"):
        assert needed("cpu", mesh, {}) == {"JAX_PLATFORMS": "cpu"}
    assert needed("cpu", "99999", {})["XLA_FLAGS"] == f"{FLAG}={environment.MOST_VIRTUAL}"


def test_auto_takes_the_gpus_that_are_there(has_gpu):
    assert needed("auto", "tp=2", {}) == ({} if has_gpu else needed("cpu", "tp=2", {}))


def test_gpus_that_are_not_there_are_refused_with_the_reason(has_gpu):
    if has_gpu:
        assert needed("gpu", "tp=2", {}) == {}
    else:
        with pytest.raises(ConfigError, match="device: got gpu; .*no NVIDIA driver"):
            needed("gpu", "tp=2", {})


def test_what_the_caller_set_is_kept():
    given = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_dump_to=x {FLAG}=4"}
    assert needed("cpu", "tp=8", given) == {}
    assert needed("cpu", "tp=8", {"XLA_FLAGS": "--xla_dump_to=x"})["XLA_FLAGS"] == f"--xla_dump_to=x {FLAG}=8"
