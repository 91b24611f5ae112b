"""What one machine has, as far as starting processes on it goes; run there, it prints that as a line of JSON.

    python -m engine.cluster.found 10.0.0.1
    {"versions": {"serac": "0.1.0", ...}, "gpus": [{"address": "0000:1b:00.0", "kind": "NVIDIA H200", "node": 0}],
     "nodes": 2, "numactl": true, "interface": "eth0", "autotuned": []}

GPUs are numbered in the order of their PCI addresses, as CUDA does with CUDA_DEVICE_ORDER=PCI_BUS_ID. All is read
from files below `root`, so that a made-up tree stands for a machine. Costs milliseconds; no device is opened.
"""

import fcntl
import importlib.metadata
import json
import shutil
import socket
import struct
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from engine.environment import gpu_problem

VERSIONS = ("serac", "jax", "jaxlib", "numpy", "protobuf", "grpcio")
DRIVER, PCI, NODES = "proc/driver/nvidia/gpus", "sys/bus/pci/devices", "sys/devices/system/node"
SIOCGIFADDR = 0x8915


@dataclass(frozen=True, slots=True)
class Gpu:
    """`node` is the NUMA node of its PCI address, -1 where the machine names none."""

    address: str
    kind: str
    node: int


@dataclass(frozen=True, slots=True)
class Found:
    """One machine. `gpus` is empty where JAX could not use them; `interface` is that of the address asked for."""

    versions: Mapping[str, str] = field(default_factory=dict)
    gpus: tuple[Gpu, ...] = ()
    nodes: int = 1
    numactl: bool = False
    interface: str = ""
    autotuned: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """Of its devices."""
        return self.gpus[0].kind if self.gpus else "cpu"


def here(address: str = "", autotune: Path | None = None) -> Found:
    """What this machine has, without GPUs that JAX could not use."""
    found = look(Path("/"), address, autotune)
    return found if gpu_problem() is None else replace(found, gpus=())


def look(root: Path, address: str = "", autotune: Path | None = None) -> Found:
    """What the machine has whose files stand below `root`."""
    return Found(
        versions={name: _version(name) for name in VERSIONS} | {"python": ".".join(map(str, sys.version_info[:2]))},
        gpus=gpus(root),
        nodes=len(list((root / NODES).glob("node[0-9]*"))) or 1,
        numactl=shutil.which("numactl") is not None,
        interface=interface(address),
        autotuned=tuple(sorted(path.name for path in autotune.glob("*.txt"))) if autotune else (),
    )


def gpus(root: Path) -> tuple[Gpu, ...]:
    """The GPUs that the driver shows, in the order of their PCI addresses."""
    return tuple(_gpu(root, folder) for folder in sorted((root / DRIVER).glob("*:*")))


def _gpu(root: Path, folder: Path) -> Gpu:
    words = dict(line.split(":", 1) for line in _text(folder / "information").splitlines() if ":" in line)
    node = _text(root / PCI / folder.name.lower() / "numa_node").strip()
    return Gpu(folder.name.lower(), words.get("Model", "").strip(), int(node) if node.isdecimal() else -1)


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def interface(address: str) -> str:
    """The name of the interface that has an IPv4 address; nothing where none has it, or it cannot be told."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(asking, SIOCGIFADDR, struct.pack("256s", name.encode()))
            except OSError:  # it has no IPv4 address
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return ""


def bind(found: Found, devices: Iterable[int]) -> list[str]:
    """What a command begins with so that it runs beside its GPUs; nothing where that would change nothing.

    A process with GPUs at several nodes may use them all, and no other.
    """
    nodes = {found.gpus[device].node for device in devices} if found.gpus else set()
    if not found.numactl or not nodes or -1 in nodes or len(nodes) >= found.nodes:
        return []
    words = ",".join(map(str, sorted(nodes)))
    return ["numactl", f"--cpunodebind={words}", f"--membind={words}"]


def told(line: str) -> Found:
    """A machine from the line it printed. Raises ValueError for anything else."""
    words = json.loads(line)
    if not isinstance(words, dict) or set(words) != set(asdict(Found())):
        raise ValueError("not the line of a machine")
    words["gpus"] = tuple(Gpu(**each) for each in words["gpus"])
    words["autotuned"] = tuple(words["autotuned"])
    return Found(**words)


def differing(ours: Found, theirs: Found) -> list[str]:
    """`jaxlib 0.10.2 there, 0.11.0 here`, for each version that is not the same."""
    names = [name for name in ours.versions if theirs.versions.get(name, "") != ours.versions[name]]
    return [f"{name} {theirs.versions.get(name) or 'none'} there, {ours.versions[name]} here" for name in names]


def main(arguments: Sequence[str]) -> None:
    """Print what this machine has."""
    address, *folder = arguments or [""]
    print(json.dumps(asdict(here(address, Path(folder[0]) if folder else None))))


if __name__ == "__main__":
    main(sys.argv[1:])
