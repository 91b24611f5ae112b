"""Over what a cluster is started, and the command of each process where we start them ourselves.

auto   -> local where every host is this machine, else ssh
local, ssh               commands(...) -> {(lane, rank): Command}, for the supervisor of the front
slurm, kubernetes, ray   their own files: scripts, manifests, placement groups
"""

from collections.abc import Mapping
from dataclasses import replace

from engine.cluster import local, ssh
from engine.cluster.found import Found, Gpu
from engine.cluster.process import Command
from engine.cluster.topology import Topology
from engine.errors import ConfigError

OVER = ("auto", "local", "ssh", "slurm", "kubernetes", "ray")


def chosen(topology: Topology, over: str) -> str:
    """What auto means for a cluster; any other is itself."""
    if over != "auto":
        return over
    return "local" if all(host.loopback for host in topology.hosts) else "ssh"


def commands(
    topology: Topology, over: str, found: dict[str, Found] | None = None
) -> dict[tuple[str, int], Command]:
    """How to start each process, by lane and rank, for local and ssh.

    `found` is what the hosts have; without it each of them is asked, at once, which takes 10 s at most.
    Raises ConfigError for a host that does not fit, Unavailable for one that does not answer.
    """
    if nameless := [host.name for host in topology.hosts if not host.address]:
        raise ConfigError(
            f"address: host {nameless[0]} has none; expected one, since {over} goes there", field="address"
        )
    place = local if over == "local" else ssh
    return place.commands(topology, alike(place.find(topology) if found is None else found))


def alike(found: Mapping[str, Found]) -> dict[str, Found]:
    """The same with the autotune files alone that every host sees: ranks that load different ones would part."""
    common = set.intersection(*(set(each.autotuned) for each in found.values()))
    return {name: replace(each, autotuned=tuple(sorted(common))) for name, each in found.items()}


def assumed(topology: Topology) -> dict[str, Found]:
    """What hosts are taken to have before anybody has asked them: the devices that the topology says."""
    on_cpu = topology.serve.get("device") == "cpu"
    return {
        host.name: Found(gpus=() if on_cpu else (Gpu("", "gpu", -1),) * (max(host.devices) + 1))
        for host in topology.hosts
    }
