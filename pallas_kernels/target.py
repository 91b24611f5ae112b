"""What programs are compiled for: told by the caller, never guessed.

A kernel of the wrong architecture aborts the process that compiles it, so a target is made from the devices of the
mesh, or from a row of `engine.planning.DEVICES` where there is no device, and handed down to who needs it.
"""

from typing import NamedTuple

import jax


class Target(NamedTuple):
    """One kind of device."""

    platform: str  # cpu, tpu, cuda, rocm, or gpu where the maker is unknown
    arch: int = 0  # NVIDIA's compute capability times ten: 90 for Hopper, 120 for a consumer Blackwell
    cores: int = 1  # multiprocessors
    kind: str = ""  # as the driver names it: NVIDIA H200


CPU = Target("cpu")
H200 = Target("cuda", 90, 132, "NVIDIA H200")


def target_of(device: jax.Device) -> Target:
    """What the driver says of `device`."""
    platform = platform_of(device)
    if platform != "cuda":
        return Target(platform, kind=device.device_kind)
    arch = round(10 * float(device.compute_capability))
    return Target(platform, arch, device.core_count, device.device_kind)


def platform_of(device: jax.Device) -> str:
    """cpu, tpu, cuda, rocm, or gpu where the maker is unknown: jax calls every GPU's platform gpu."""
    if device.platform != "gpu":
        return device.platform
    makers = {"NVIDIA": "cuda", "AMD": "rocm"}
    return next((name for maker, name in makers.items() if maker in device.device_kind), "gpu")
