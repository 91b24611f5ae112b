"""What this host says of itself: facts for the checks, gathered without JAX and without changing anything.

    gather(address, cache, ports) -> Facts

Costs some tens of milliseconds, and a second where nvidia-smi is asked.
"""

import contextlib
import importlib.metadata
import os
import resource
import shutil
import socket
import stat
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from engine.cluster.checks import REQUIREMENT, Facts
from engine.cluster.found import interface, look
from engine.environment import gpu_problem, programs_folder

SMI = ("nvidia-smi", "--query-gpu=memory.free,memory.total,driver_version", "--format=csv,noheader,nounits")
SMI_S = 5.0
SAMPLE_S = 0.05


def gather(address: str, cache: Path | None, ports: Mapping[str, tuple[str, int]]) -> Facts:
    """`address` is the lane's; `ports` by what they are called: where somebody will listen."""
    requires = requirements()
    found = look(Path("/"), address)
    free, driver = gpus() if found.gpus else ((), "")
    names = [match[1] for each in requires if (match := REQUIREMENT.fullmatch(each))]
    return Facts(
        versions={name: _version(name) for name in names} | dict(found.versions),
        requires=requires,
        gpus=[gpu.kind for gpu in found.gpus],
        gpu_problem=(gpu_problem() or "") if found.gpus else "",
        driver=driver,
        gpu_free=free,
        memory_free=_memory_free(),
        shm_free=_shm_free(),
        nofile=_limit(resource.RLIMIT_NOFILE),
        memlock=_limit(resource.RLIMIT_MEMLOCK),
        clock_ratio=_clock_ratio(),
        wall_s=time.time(),
        cache_problem=cache_problem(cache or programs_folder(os.environ)),
        taken=[name for name, where in ports.items() if taken(*where)],
        interface=interface(address),
        named=named(address),
    )


def requirements() -> list[str]:
    """What Serac declares, without its extras."""
    try:
        declared = importlib.metadata.requires("serac") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    return [each for each in declared if "extra ==" not in each]


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def gpus() -> tuple[list[float], str]:
    """The free share of each GPU's memory, and the driver; nothing where nvidia-smi does not say."""
    try:
        said = subprocess.run(SMI, capture_output=True, text=True, timeout=SMI_S, check=True).stdout
        rows = [[part.strip() for part in line.split(",")] for line in said.splitlines() if line.strip()]
        return [float(free) / float(total) for free, total, _ in rows], rows[0][2] if rows else ""
    except (OSError, subprocess.SubprocessError, ValueError, ZeroDivisionError):
        return [], ""


def _memory_free() -> int:
    """What new processes may take before the machine, or the limit of this container, is full."""
    machine = 0
    with contextlib.suppress(OSError):
        words = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        machine = 1024 * int(words["MemAvailable"].split()[0])
    with contextlib.suppress(OSError, ValueError):  # "max" is no number
        group = Path("/sys/fs/cgroup")
        left = int((group / "memory.max").read_text()) - int((group / "memory.current").read_text())
        machine = min(machine, max(left, 0))
    return machine


def _shm_free() -> int:
    with contextlib.suppress(OSError):
        return shutil.disk_usage("/dev/shm").free
    return 0


def _limit(which: int) -> int:
    soft, _ = resource.getrlimit(which)
    return -1 if soft == resource.RLIM_INFINITY else soft


def _clock_ratio() -> float:
    monotonic, wall = time.monotonic(), time.time()
    time.sleep(SAMPLE_S)
    passed = time.time() - wall
    return (time.monotonic() - monotonic) / passed if passed > 0 else 0.0


def cache_problem(folder: Path) -> str:
    """Why programs cannot be kept there for their owner alone; nothing when they can."""
    there = folder
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        return "its folder cannot be written"
    if there != folder:
        return ""  # the server makes it, with mode 0700
    found = there.stat()
    if found.st_uid != os.geteuid():
        return "its folder belongs to somebody else"
    mode = stat.S_IMODE(found.st_mode)
    return f"its folder has mode {mode:04o}, so that others may enter" if mode & 0o077 else ""


def taken(host: str, port: int) -> bool:
    """Whether somebody listens there."""
    if port == 0:
        return False
    try:
        socket.create_server((host, port)).close()
    except OSError:
        return True
    return False


def named(address: str) -> str:
    """Where the host's own name leads."""
    try:
        found = socket.gethostbyname(socket.gethostname())
    except OSError:
        return "nothing"
    if found == address:
        return "address"
    return "loopback" if found.startswith("127.") else "another address"


def reach(addresses: Mapping[str, Sequence], timeout_s: float) -> dict[str, float | None]:
    """Seconds until each answers, by name; None where it does not. One after the other costs the timeout each."""
    found: dict[str, float | None] = {}
    for name, (host, port) in addresses.items():
        began = time.perf_counter()
        try:
            socket.create_connection((host, int(port)), timeout_s).close()
            found[name] = time.perf_counter() - began
        except OSError:
            found[name] = None
    return found
