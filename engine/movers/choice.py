"""Which ways KV may take between processes, as `--kv-mover` says.

    auto       memory within a host, sockets between hosts
    sockets    sockets, also within a host
    nixl       the library wherever both sides have it; what it refuses goes as with auto

Nothing is a fallback at the start: who asks for the library and has none is told how to install it. It encrypts
nothing and asks nobody for a secret, so beyond this host it needs a network that the operator trusts; which devices
it uses there UCX_NET_DEVICES says.
"""

from collections.abc import Sequence
from typing import NamedTuple

from engine.errors import ConfigError, wrong
from engine.movers import addresses
from engine.movers.links import Limits
from engine.movers.nixl import Nixl, library, quiet
from engine.movers.pull import Mover


class Ways(NamedTuple):
    """What links take. The mover belongs to the process, which closes it after the last links that use it."""

    limits: Limits = Limits()
    mover: Mover | None = None

    def close(self) -> None:
        """Once nothing uses them."""
        if self.mover is not None:
            self.mover.close()


def check(kv_mover: str) -> None:
    """Before anything is loaded. Raises ConfigError where the library is missing."""
    if kv_mover == "nixl":
        with quiet():
            library()


def choose(kv_mover: str, listen: Sequence[str], trusted: bool = False) -> Ways:
    """For a process that listens at these addresses. Raises ConfigError."""
    if kv_mover == "sockets":
        return Ways(Limits(shared_bytes=0))
    if kv_mover != "nixl":
        return Ways()
    local = all(addresses.parse(each).loopback for each in listen)
    if not local and not trusted:
        expected = "--trusted-network beside it, as it sends KV in the clear to whoever reaches its ports"
        raise ConfigError(wrong("--kv-mover", "nixl between hosts", expected), field="kv_mover")
    return Ways(mover=Nixl(devices="lo" if local else ""))
