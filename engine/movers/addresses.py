"""Where a process listens: `unix:/directory/name.sock`, or `host:port`.

A unix socket stands in a directory that its owner alone may enter; a host that is not loopback needs TLS.
"""

import ipaddress
import os
import stat
from pathlib import Path
from typing import NamedTuple

from engine.errors import ConfigError, wrong

LONGEST = 107  # bytes of a unix socket's path


class Address(NamedTuple):
    """A path, or a host and a port."""

    path: str
    host: str
    port: int

    @property
    def loopback(self) -> bool:
        """Nobody outside this machine reaches it."""
        if self.path or self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"unix:{self.path}" if self.path else f"{host}:{self.port}"


def parse(words: str) -> Address:
    """The address that `words` say. Raises ConfigError."""
    if words.startswith("unix:"):
        path = words.removeprefix("unix:")
        if not os.path.isabs(path) or len(os.fsencode(path)) > LONGEST:
            raise ConfigError(wrong("address", words, f"unix: and an absolute path of at most {LONGEST} bytes"))
        return Address(path, "", 0)
    host, _, port = words.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise ConfigError(wrong("address", words, "unix:/path or host:port"))
    return Address("", host, int(port))


def check_tls(address: Address, tls: object | None) -> None:
    """Raise ConfigError where bytes would leave the machine unprotected."""
    if not address.loopback and tls is None:
        raise ConfigError("address: got one that is not loopback, without TLS; give certificates or use 127.0.0.1")


def prepare(path: str) -> None:
    """Make the directory of a socket, for its owner alone. Raises ConfigError when others may enter it."""
    directory = Path(path).parent
    try:
        directory.mkdir(mode=0o700, exist_ok=True)
        found = directory.lstat()
    except OSError as error:
        raise ConfigError(f"address: the directory of the socket cannot be made ({type(error).__name__})") from None
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
        raise ConfigError("address: the directory of the socket must be its owner's alone (chmod 700)")
