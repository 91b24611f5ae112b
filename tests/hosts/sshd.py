"""A real sshd on a host of namespaces: an unprivileged port, keys of its own that live as long as it does.

    with Sshd(hosts[1], folder) as sshd:
        hosts[0].run(["ssh", *sshd.options, sshd.host.address, "true"])

The client's file names its own key and its own list of known hosts, and nothing of the user's. sshd is the
installed one, or comes from Debian's package, unpacked. Cost: 50 ms.
"""

import shutil
import subprocess
import sys
import time
from pathlib import Path

from tests.hosts.namespaces import Host
from tests.hosts.packages import libraries, unpack

INSTALLED = Path("/usr/sbin/sshd")
PACKAGES = ["openssh-server", "libwrap0"]
PORT = 2222
START_S = 20.0
ROOT = Path(__file__).parents[2]


def why_not() -> str:
    """Why there can be no sshd here, in a sentence; nothing when there can."""
    if shutil.which("ssh") is None:
        return "there is no ssh here (Debian's openssh-client brings it)"
    try:
        program()
    except LookupError as error:
        return str(error)
    return ""


def program() -> list[str]:
    """How to call sshd. Raises LookupError in a sentence where there is none."""
    if INSTALLED.exists():
        return [str(INSTALLED)]
    root = unpack(PACKAGES)
    return ["env", f"LD_LIBRARY_PATH={libraries(root)}", str(root / "usr/sbin/sshd")]


def keys(folder: Path, name: str) -> str:
    """A fresh pair `name`, `name.pub` in `folder`; the public half."""
    subprocess.run(
        ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", folder / name], check=True, timeout=20
    )
    return (folder / f"{name}.pub").read_text()


def python(folder: Path) -> Path:
    """An interpreter to be named by its path, which finds this checkout from anywhere."""
    script = folder / "python"
    script.write_text(f'#!/bin/sh\nexec env PYTHONPATH={ROOT} {sys.executable} "$@"\n')
    script.chmod(0o755)
    return script


class Sshd:
    """One server. `lines` are added to its configuration."""

    def __init__(self, host: Host, folder: Path, *lines: str):
        self.host = host
        self.folder = folder / f"sshd-{host.name}"
        self.folder.mkdir()
        own, client = keys(self.folder, "host_key"), keys(self.folder, "client_key")
        self.port, self.key = PORT, self.folder / "client_key"
        self.known_hosts = self.folder / "known_hosts"
        self.known_hosts.write_text("".join(f"[{name}]:{PORT} {own}" for name in (host.address, host.name)))
        (self.folder / "authorized_keys").write_text(client)
        self.client = self.folder / "client"  # those of several hosts, one after the other, make one file
        self.client.write_text(self._client())
        self.log = self.folder / "log"
        self._process: subprocess.Popen | None = None
        (self.folder / "config").write_text("\n".join([*self._settings(), *lines]) + "\n")

    def _settings(self) -> list[str]:
        return [
            f"ListenAddress {self.host.address}:{PORT}",
            f"HostKey {self.folder / 'host_key'}",
            f"AuthorizedKeysFile {self.folder / 'authorized_keys'}",
            "PidFile none",
            "UsePAM no",
            "StrictModes no",
            "PasswordAuthentication no",
            "KbdInteractiveAuthentication no",
            "PermitRootLogin prohibit-password",
            "LogLevel VERBOSE",
        ]

    @property
    def options(self) -> list[str]:
        """What a client on another host gives to ssh before the host's name or address."""
        return ["-F", str(self.client)]

    def _client(self) -> str:
        """A client's configuration, which asks nobody, trusts nothing else and uses nothing of the user's."""
        lines = [
            f"Host {self.host.name} {self.host.address}",
            f"Port {PORT}",
            f"IdentityFile {self.key}",
            "IdentitiesOnly yes",
            "IdentityAgent none",
            "BatchMode yes",
            "StrictHostKeyChecking yes",
            f"UserKnownHostsFile {self.known_hosts}",
            "GlobalKnownHostsFile /dev/null",
            "ConnectTimeout 5",
            "LogLevel ERROR",
        ]
        return "\n  ".join(lines) + "\n"

    def __enter__(self) -> "Sshd":
        self._process = self.host.popen([*program(), "-D", "-f", self.folder / "config", "-E", self.log])
        until = time.monotonic() + START_S
        while not (self.log.exists() and "listening" in self.log.read_text()):
            if self._process.poll() is not None or time.monotonic() > until:
                self.close()
                raise OSError(f"sshd does not start: {self.log.read_text() if self.log.exists() else 'no log'}")
            time.sleep(0.01)
        return self

    def close(self) -> None:
        """End the listener; sessions go on, as after a restart of sshd."""
        self._process.kill()
        self._process.wait()

    def __exit__(self, *_) -> None:
        self.close()
