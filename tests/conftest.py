"""Every test sees eight virtual CPU devices; the flag must be set before JAX starts."""

import os

flags = os.environ.get("XLA_FLAGS", "")
if "host_platform_device_count" not in flags:
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=8".strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import tempfile  # noqa: E402

# Programs that several tests compile are compiled once in a run; SERAC_TEST_CACHE keeps them between runs.
os.environ["XDG_CACHE_HOME"] = os.environ.get("SERAC_TEST_CACHE") or tempfile.mkdtemp(prefix="serac-tests-")

import pytest  # noqa: E402

from engine.replica.build import use_compile_cache  # noqa: E402


@pytest.fixture(scope="session", autouse=True)
def compiled_once():
    """The folder of compiled programs that a server would use, for every test."""
    use_compile_cache(None)
