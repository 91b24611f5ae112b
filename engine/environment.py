"""What the environment of a process that will import JAX must hold, decided before it does.

    device auto -> gpu where there is an NVIDIA driver and JAX's plugin for it, else cpu
    cpu         -> JAX_PLATFORMS=cpu and as many virtual devices as the mesh takes

JAX reads these once, when it starts; so the command line starts itself anew with them (`needed` is then empty) and
prints what it set. What the caller's environment says already is never overruled.
"""

import importlib.util
import math
import re
from collections.abc import Mapping
from pathlib import Path

from engine.errors import ConfigError
from engine.lanes import device_count

DRIVER = Path("/dev/nvidiactl")
PLUGINS = ("jax_cuda13_plugin", "jax_cuda12_plugin")
DEVICE_COUNT = "--xla_force_host_platform_device_count"
MOST_VIRTUAL = 64
INSTALL = "pip install 'serac[cuda]'"


def programs_folder(environment: Mapping[str, str]) -> Path:
    """Where compiled programs are kept unless told otherwise."""
    return Path(environment.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "serac" / "programs"


def gpu_problem() -> str | None:
    """Why this machine's GPUs cannot be used, None when they can."""
    if not DRIVER.exists():
        return "no NVIDIA driver here"
    if not any(importlib.util.find_spec(plugin) for plugin in PLUGINS):
        return f"JAX has no GPU plugin here; {INSTALL}"
    return None


def needed(device: str, mesh: str, environment: Mapping[str, str]) -> dict[str, str]:
    """Variables to set, and their values; empty when all is as it must be. Raises ConfigError for absent GPUs."""
    problem = None if device == "cpu" else gpu_problem()
    if device == "gpu" and problem is not None:
        raise ConfigError(f"device: got gpu; expected cpu or auto: {problem}", field="device")
    if device != "cpu" and problem is None:
        return {}
    wanted = {}
    if "JAX_PLATFORMS" not in environment:
        wanted["JAX_PLATFORMS"] = "cpu"
    flags = environment.get("XLA_FLAGS", "")
    count = virtual_devices(devices_of(mesh))
    if DEVICE_COUNT not in flags and count > 1:
        wanted["XLA_FLAGS"] = f"{flags} {DEVICE_COUNT}={count}".strip()
    return wanted


def devices_of(mesh: str) -> int:
    """How many devices `mesh`, or a list of lanes, takes; what is neither is refused later, by name."""
    return device_count(mesh) if ":" in mesh else math.prod(int(size) for size in re.findall(r"\d{1,4}", mesh))


def virtual_devices(wanted: int) -> int:
    """How many virtual devices there are for so many that are wanted."""
    return min(wanted, MOST_VIRTUAL)
