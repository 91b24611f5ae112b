"""What the doctor is asked to look at: this machine, processes of it, or the hosts of a cluster.

here(settings, processes) | over(topology)  ->  Asked  --engine/cluster/doctor.py-->  findings
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from engine.cluster.rules import private
from engine.cluster.topology import LOOPBACK, Host, Security, Topology, ip
from engine.config import Settings
from engine.errors import ConfigError

LAUNCHER = "this machine"


@dataclass(frozen=True, slots=True)
class Asked:
    """What to look at. `front` names the host whose ports are asked for; this machine where it is none of them."""

    hosts: Sequence[Host]
    settings: Settings
    security: Security = field(default_factory=Security)
    front: str = LAUNCHER
    jax: bool = True  # the model and the all-reduce too

    @property
    def ports(self) -> dict[str, tuple[str, int]]:
        """Where the front will listen, by what it is called."""
        settings = self.settings
        found = {"port": (settings.host, settings.port), "admin_port": (settings.admin_host, settings.admin_port)}
        if settings.metrics_port is not None:
            found["metrics_port"] = (settings.admin_host, settings.metrics_port)
        return {f"{name} {where[1]}": where for name, where in found.items()}


def here(settings: Settings, processes: int, jax: bool) -> Asked:
    """This machine, as one host or as the processes that one lane would have here."""
    if processes == 1:
        return Asked([Host(LAUNCHER, LOOPBACK)], settings, jax=jax)
    hosts = [Host(f"p{rank}", LOOPBACK) for rank in range(processes)]
    return Asked(hosts, settings, front="p0", jax=jax)


def over(topology: Topology, jax: bool) -> Asked:
    """The hosts of a cluster. Raises ConfigError for one without an address."""
    for host in topology.hosts:
        if not host.address:
            raise ConfigError(
                f"address: host {host.name} has none; expected where the others reach it", field="address"
            )
    return Asked(topology.hosts, topology.settings, topology.security, topology.front.on or LAUNCHER, jax)


def unguarded(hosts: Sequence[Host], security: Security) -> str:
    """Why JAX may not talk between these hosts, as in a lane over them; nothing when it may."""
    away = [host for host in hosts if not host.loopback]
    if len(hosts) < 2 or not away:
        return ""
    for host in away:
        if (found := ip(host.address)) is None or not private(found):
            return f"the address of {host.name} is not a private one"
    return "" if security.trusted_network else "the network between the hosts is not said to be trusted"
