"""Which process of a cluster runs where, as data: hosts, lanes over them, the front, and the rules they keep.

    hosts   h0 [0 1 2 3]   h1 [0 1 2 3]              lanes   p0 prefill tp=4 on h0, h1    d1 decode tp=4 on h0, h1
    placed  p0 rank 0 -> h0 [0 1]   p0 rank 1 -> h1 [0 1]   d1 rank 0 -> h0 [2 3]   d1 rank 1 -> h1 [2 3]

A lane has one process an entry of its hosts, in that order: the first is rank 0, its leader. Devices of a host are
given out in the order of the lanes, each once, and always by number. No host is asked here.
"""

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from engine.config import PATH, PORT, SWITCH, TEXT, Settings, Value, row
from engine.errors import ConfigError, wrong
from engine.lanes import LaneSpec

LOCAL = "localhost"
LOOPBACK = "127.0.0.1"
ANY_PORT = f"{LOOPBACK}:0"


@dataclass(frozen=True, slots=True)
class Host:
    """A machine. `devices` are the numbers of those that lanes may have."""

    name: str = row("", TEXT, "how lanes call it; under Slurm the name of its node")
    address: str = row("", TEXT, "where the others reach it; left out where Kubernetes gives it")
    devices: tuple[int, ...] = ()
    user: str = row("", TEXT, "who to be there over ssh; default: as ssh does")
    port: int = row(22, PORT, "of its sshd")
    key: Path | None = row(None, PATH, "private key for ssh; default: as ssh does")
    python: str = row("python3", TEXT, "the interpreter that has Serac there")

    @property
    def loopback(self) -> bool:
        """Whether nobody else reaches its address."""
        return self.address == LOCAL or bool((found := ip(self.address)) and found.is_loopback)


@dataclass(frozen=True, slots=True)
class FrontPlace:
    """Where the front listens: to clients by settings of their own names, to lanes at `address`."""

    address: str = row(ANY_PORT, TEXT, "HOST:PORT where lanes reach the front")
    on: str = row("", TEXT, "Slurm: the host it runs on; default: any")
    host: str = row("127.0.0.1", TEXT, "address of the gRPC listener")
    port: int = row(50051, PORT, "its port")
    admin_host: str = row("127.0.0.1", TEXT, "address of the admin listener")
    admin_port: int = row(50052, PORT, "its port")
    metrics_port: int | None = row(None, PORT, "Prometheus metrics over HTTP on the admin host")


@dataclass(frozen=True, slots=True)
class Security:
    """What guards the ports between processes."""

    certs: Path | None = row(None, PATH, "folder of this host's certificates, for TLS between processes")
    secret_file: Path | None = row(None, PATH, "file of the cluster's secret, where its owner alone may read it")
    known_hosts: Path | None = row(None, PATH, "known hosts of ssh; default: as ssh does")
    trusted_network: bool = row(False, SWITCH, "lanes over several hosts may talk without TLS on their interface")


@dataclass(frozen=True, slots=True)
class Topology:
    """A whole cluster. `serve` holds settings of engine/config.py."""

    hosts: tuple[Host, ...]
    lanes: tuple[LaneSpec, ...]
    name: str = "serac"
    front: FrontPlace = FrontPlace()
    security: Security = Security()
    serve: Mapping[str, Value] = field(default_factory=dict)
    autotune: Path | None = None

    def host(self, name: str) -> Host:
        """The host of a name that a lane uses."""
        return next(host for host in self.hosts if host.name == name)

    def lane(self, name: str) -> LaneSpec:
        """The lane of a name. Raises ConfigError."""
        for lane in self.lanes:
            if lane.name == name:
                return lane
        raise ConfigError(
            wrong("lane", name, "one of " + ", ".join(lane.name for lane in self.lanes)), field="lane"
        )

    @property
    def settings(self) -> Settings:
        """What the front serves by."""
        own = {name: getattr(self.front, name) for name in FRONT_SETTINGS}
        return Settings(**{**self.serve, **own})


FRONT_SETTINGS = ("host", "port", "admin_host", "admin_port", "metrics_port")


class Placed(NamedTuple):
    """One process: `rank` of `lane`, with `devices` of `host`."""

    lane: LaneSpec
    rank: int
    host: Host
    devices: tuple[int, ...]

    @property
    def slot(self) -> tuple[str, int]:
        """What it is called by."""
        return self.lane.name, self.rank


def placed(topology: Topology) -> tuple[Placed, ...]:
    """A process for each entry of each lane's hosts, by lane and rank. Takes a topology without mistakes."""
    free = {host.name: list(host.devices) for host in topology.hosts}
    found = []
    for lane in topology.lanes:
        share = lane.tp // len(lane.hosts)
        for rank, name in enumerate(lane.hosts):
            mine, free[name] = free[name][:share], free[name][share:]
            found.append(Placed(lane, rank, topology.host(name), tuple(mine)))
    return tuple(found)


def ip(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(address)
    except ValueError:
        return None
