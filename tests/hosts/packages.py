"""Programs of Debian packages, unpacked into the tests' cache and run from there; nothing is installed.

    unpack(["openssh-server", "libwrap0"])  ->  CACHE/packages/<names>/usr/sbin/sshd ...

The first call downloads through apt, a later one finds the folder. Cost: a second, and the packages' size.
"""

import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

DOWNLOAD_S = 30.0


def unpack(names: list[str]) -> Path:
    """The folder that holds the files of all packages. Raises LookupError in a sentence when they cannot be had."""
    key = hashlib.sha256(" ".join(sorted(names)).encode()).hexdigest()[:12]
    folder = Path(os.environ["XDG_CACHE_HOME"]) / "packages" / key
    if folder.is_dir():
        return folder
    for tool in ("apt-get", "dpkg"):
        if shutil.which(tool) is None:
            raise LookupError(f"{names[0]} comes as a Debian package, and there is no {tool} here")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        _call(["apt-get", "-o", "Acquire::Retries=0", "download", *names], work)
        for package in sorted(Path(work).glob("*.deb")):
            _call(["dpkg", "-x", package.name, "root"], work)
        (Path(work) / "root").chmod(0o755)
        if not folder.is_dir():
            (Path(work) / "root").rename(folder)
    return folder


def libraries(folder: Path) -> str:
    """The LD_LIBRARY_PATH of what was unpacked."""
    return ":".join(sorted({str(path.parent) for path in folder.rglob("*.so*")}))


def _call(command: list[str], folder: str) -> None:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=DOWNLOAD_S)
    except subprocess.TimeoutExpired:
        raise LookupError(f"{command[0]} did not end within {DOWNLOAD_S:.0f} s") from None
    if done.returncode:
        raise LookupError(f"{command[0]} failed: {done.stderr.strip().splitlines()[-1]}")
