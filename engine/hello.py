"""What a worker process is, and the first thing it says, before JAX is loaded: so a missing host is soon known.

    Place      which rank of which lane this is, where it meets the others
    Doors      what rank 0 of several listens at: orders for its followers, and JAX's coordinator
    hello()    {"event": "hello", ...} with all that the processes of one lane must have alike

The one that started the processes waits for the hello of each, compares them, and answers with "start".
"""

import importlib.metadata
import ipaddress
import platform
import re
import socket
from collections.abc import Mapping
from typing import NamedTuple

from engine.config import ROWS, Settings, whole
from engine.core.roles import Role
from engine.errors import ConfigError, wrong
from engine.movers.sockets import address_of

PROCESSES, RANK = whole(1, 4096), whole(0, 4095)
VERSIONS = ("serac", "jax", "jaxlib", "numpy")
OF_A_RANK = ("plan_log", "compile_cache", "log_level")  # settings that may differ within a lane


class Place(NamedTuple):
    """Process `rank` of so many of a lane; the others reach it at the address `interface`.

    devices  numbers of the host's devices that are this process's; None: all that it sees
    trusted  nobody else reaches the network of that address
    """

    lane: str
    role: Role
    rank: int = 0
    processes: int = 1
    interface: str = "127.0.0.1"
    devices: tuple[int, ...] | None = None
    trusted: bool = False

    @property
    def local_ids(self) -> tuple[int, ...] | None:
        """Numbers of its devices among those that JAX sees, which are its own and no others."""
        return None if self.devices is None else tuple(range(len(self.devices)))


def place_of(words: Mapping[str, str | None], role: Role, tp: int, trusted: bool) -> Place:
    """The place that the flags lane, rank, processes, devices and lane_interface name. Raises ConfigError."""
    spelled = {name: "--" + name.replace("_", "-") for name in words}
    processes = PROCESSES.given(spelled["processes"], words["processes"]) or 1
    rank = RANK.given(spelled["rank"], words["rank"]) or 0
    assert isinstance(processes, int) and isinstance(rank, int)
    if rank >= processes:
        raise ConfigError(wrong("rank", rank, f"0..{processes - 1}, as there are {processes}"), field="rank")
    if tp % processes:
        raise ConfigError(wrong("processes", processes, f"a number that divides tp={tp}"), field="processes")
    devices = _numbers(words["devices"])
    if devices is not None and len(devices) != tp // processes:
        expected = f"{tp // processes} numbers, tp={tp} over {processes} processes"
        raise ConfigError(wrong("devices", words["devices"], expected), field="devices")
    place = Place(words["lane"] or "", role, rank, processes, words["lane_interface"] or "", devices, trusted)
    _check_interface(place, trusted)
    return place


def _check_interface(place: Place, trusted: bool) -> None:
    """JAX's coordinator and the collectives know no authentication, so who reaches them must be known."""
    try:
        found = ipaddress.ip_address(place.interface)
    except ValueError:
        raise ConfigError(
            wrong("lane_interface", place.interface, "an IP address of this host"), field="lane_interface"
        ) from None
    found = getattr(found, "ipv4_mapped", None) or found  # ::ffff:0.0.0.0 is every address of IPv4
    if place.processes == 1 or found.is_loopback:
        return
    if found.is_unspecified or not found.is_private:
        raise ConfigError(
            "lane_interface: got a public address; a lane over several processes talks without authentication and "
            "needs a private one, or loopback", field="lane_interface")  # fmt: skip
    if not trusted:
        raise ConfigError(
            "lane_interface: got one beyond this host; a lane over several processes talks without authentication "
            "there: --trusted-network says that nobody else reaches it", field="lane_interface")  # fmt: skip


def _numbers(words: str | None) -> tuple[int, ...] | None:
    if words is None:
        return None
    if not re.fullmatch(r"\d{1,4}(,\d{1,4})*", words, re.ASCII):
        raise ConfigError(wrong("devices", words, "numbers such as 0,1,2,3"), field="devices")
    found = tuple(int(word) for word in words.split(","))
    if len(set(found)) < len(found):
        raise ConfigError(wrong("devices", words, "each number once"), field="devices")
    return found


class Doors(NamedTuple):
    """Where rank 0 is met: a listener for its followers, and an address for JAX's coordinator."""

    orders: socket.socket
    coordinator: str


def open_doors(place: Place) -> Doors | None:
    """Listen for the other processes, if this one leads any. Raises ConfigError."""
    if place.rank or place.processes == 1:
        return None
    return Doors(_listen(place.interface), _free(place.interface))


def hello(place: Place, settings: Settings, doors: Doors | None) -> dict[str, object]:
    """What this process says of itself first."""
    said: dict[str, object] = {"event": "hello", "lane": place.lane, "rank": place.rank}
    said |= {"processes": place.processes, "alike": alike(settings)}
    if doors is not None:
        said |= {"orders": str(address_of(doors.orders)), "coordinator": doors.coordinator}
    return said


def alike(settings: Settings) -> dict[str, str]:
    """What the processes of one lane must have alike, in words."""
    found = {name: _version(name) for name in VERSIONS} | {"python": platform.python_version()}
    given = {name: getattr(settings, name) for name in ROWS if name not in OF_A_RANK}
    return found | {name: str(value) for name, value in given.items() if value != ROWS[name].default}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""  # run from a folder, not installed


def _listen(interface: str) -> socket.socket:
    try:
        return socket.create_server((interface, 0), family=_family(interface))
    except OSError as error:
        raise ConfigError(
            f"lane_interface: this host cannot listen there ({error.strerror}); expected an address of its own",
            field="lane_interface",
        ) from None


def _free(interface: str) -> str:
    """An address with a port that is free now: JAX opens it itself, a little later."""
    with _listen(interface) as found:
        return str(address_of(found))


def _family(interface: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in interface else socket.AF_INET
