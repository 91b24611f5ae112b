"""Pythons beside the one that runs the tests: environments of their own, with packages that compile for devices.

    candidates --run each--> a Python that jax can use --venv, pip--> environment, kept in a cache by its pins

Looking a Python up is not enough: what stands on PATH may be a shim that only prints an error, or lack venv or
ensurepip. An environment is made once, in about a minute, and takes 1.4 GB; where CI is not true none is made, and
a test that wants one is skipped unless it is there already.
"""

import fcntl
import functools
import glob
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from bench.ahead import pinned

OLDEST, NEWEST = (3, 12), (3, 14)  # of the Pythons for which jax 0.11.2 is made
JAX, OLD_JAX = "0.11.2", "0.10.2"
NAMES = ("python3.12", "python3.13", "python3.14", "python3")
PLACES = (
    "~/.pyenv/versions/*/bin/python",
    "~/.local/share/uv/python/*/bin/python3",
    "~/miniconda3/bin/python",
    "~/miniconda3/envs/*/bin/python",
    "~/anaconda3/bin/python",
    "~/miniforge3/bin/python",
    "/opt/conda/bin/python",
    "/opt/*/bin/python3",
    "/opt/python/*/bin/python",
    "/usr/local/bin/python3*",
    "/usr/bin/python3*",
)
PROBE = "import sys, venv, ensurepip, ssl, ctypes; print(*sys.version_info[:2], sys.executable)"
SUMMARY = pytest.StashKey[str]()  # of the run's configuration: the line that stands in its summary


class Kind(NamedTuple):
    """What an environment holds; the second list is installed without what it depends on."""

    jax: str
    packages: tuple[str, ...]
    alone: tuple[str, ...] = ()


TESTS = ("pytest>=8.3", "hypothesis>=6.120")
GPU = Kind(JAX, (f"jax=={JAX}", "numpy", "ml_dtypes", "absl-py", *TESTS), tuple(pinned(JAX)))
OLD_GPU = Kind(OLD_JAX, (f"jax=={OLD_JAX}", "numpy", "ml_dtypes", "absl-py"), tuple(pinned(OLD_JAX)))
TPU = Kind(JAX, (f"jax[tpu]=={JAX}", "numpy"))


def candidates() -> Iterator[str]:
    """Everything that may be a Python, the likeliest first."""
    yield sys.executable
    yield from filter(None, map(shutil.which, NAMES))
    for place in (f"{Path(sys.base_prefix).parent}/*/bin/python", *PLACES):  # first what is beside the running one
        yield from sorted(glob.glob(os.path.expanduser(place)))


@functools.cache
def find() -> str | None:
    """A Python that runs jax 0.11.2, found by running it."""
    return next((path for path in dict.fromkeys(candidates()) if runs(path)), None)


def runs(path: str) -> bool:
    """Whether `path` is a Python of the right age that can make environments."""
    try:
        done = subprocess.run([path, "-c", PROBE], capture_output=True, text=True, timeout=20, cwd="/")
    except (OSError, subprocess.TimeoutExpired):
        return False
    words = done.stdout.split()
    if done.returncode or len(words) < 2 or not all(word.isdigit() for word in words[:2]):
        return False
    return OLDEST <= (int(words[0]), int(words[1])) <= NEWEST


def wanted() -> tuple[str, Kind]:
    """The Python and the environment for compiling: the older one where no Python is new enough."""
    path = find()
    return (sys.executable, OLD_GPU) if path is None else (path, GPU)


def home(base: str, kind: Kind) -> Path:
    """Where an environment is kept."""
    key = hashlib.sha256(repr((base, kind)).encode()).hexdigest()[:12]
    cache = os.environ.get("SERAC_TEST_CACHE") or os.path.expanduser("~/.cache/serac")
    return Path(cache) / "pythons" / f"jax-{kind.jax}-{key}"


def environment(base: str, kind: Kind) -> str:
    """The Python of the environment of `kind`, made if CI is true; otherwise the test is skipped by name."""
    folder = home(base, kind)
    python, ready = folder / "bin/python", folder / "ready"
    if ready.exists():
        return str(python)
    if os.environ.get("CI") != "true":
        pytest.skip(f"asks a package index for jax {kind.jax} and compilers; runs where CI=true")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.parent / f"{folder.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not ready.exists():
            shutil.rmtree(folder, ignore_errors=True)
            run(base, "-m", "venv", str(folder))
            run(str(python), "-m", "pip", "install", "-q", *kind.packages)
            if kind.alone:
                run(str(python), "-m", "pip", "install", "-q", "--no-deps", *kind.alone)
            ready.touch()
    return str(python)


def run(*command: str) -> None:
    """Raises RuntimeError with what the command said last."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {(done.stderr or done.stdout)[-2000:]}")
