"""The rules that a cluster keeps, each mistake with the place where it stands.

    lane 1, hosts:  hosts: h0 is over-subscribed: rank 0 of d1 takes 4 devices, and 2 of its 4 are left

Nothing here asks a host; a cluster without mistakes can be placed, and none of its ports is open to strangers:
what speaks without TLS stays on loopback, or on a private network that the operator calls trusted.
"""

import ipaddress
import re
from collections.abc import Iterator, Sequence

from engine.cluster.topology import LOCAL, Host, Topology, ip
from engine.errors import ConfigError, wrong
from engine.lanes import LaneSpec
from engine.movers import addresses

NAME = re.compile(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", re.ASCII)  # Kubernetes names pods by it
NAMED = "a small letter, then small letters, digits and -, at most 40"
TAKEN = ("front", "lanes", "topology", "inside", "cluster")  # what else Kubernetes and Slurm name after the cluster
HOST_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,252}[A-Za-z0-9])?", re.ASCII)

Where = tuple[str, int, str]  # table, its index among those of the name, key; "" stands for the table itself


def mistakes(topology: Topology) -> Iterator[tuple[Where, str]]:
    """What breaks a rule, and where it stands; nothing of a cluster that can be started."""
    if not NAME.fullmatch(topology.name):
        yield ("cluster", 0, "name"), wrong("name", topology.name, NAMED)
    yield from _of_hosts(topology.hosts)
    yield from _of_names(topology)
    if not (unknown := list(_of_lanes(topology))):
        unknown = [*_over_subscribed(topology), *_of_spanning(topology)]
    yield from unknown
    yield from _of_roles(topology.lanes)
    yield from _of_front(topology)


def _of_hosts(hosts: Sequence[Host]) -> Iterator[tuple[Where, str]]:
    if not hosts:
        yield ("host", 0, ""), "host: got none; expected [[host]] with name, address and devices"
    owners: dict[tuple[str, int], str] = {}
    for index, host in enumerate(hosts):
        if not HOST_NAME.fullmatch(host.name):
            yield ("host", index, "name"), wrong("name", host.name, "letters, digits, . - and _")
        if host.address not in ("", LOCAL) and ip(host.address) is None:
            yield ("host", index, "address"), wrong("address", host.address, "an IP address")
        if not host.devices or len(set(host.devices)) < len(host.devices) or min(host.devices) < 0:
            got = list(host.devices)
            yield ("host", index, "devices"), wrong("devices", got, "a count > 0 or numbers >= 0, each once")
        for device in host.devices if host.address else ():
            if (other := owners.setdefault((host.address, device), host.name)) != host.name:
                yield ("host", index, "devices"), f"devices: {device} of this address is {other}'s already"
                break


def _of_names(topology: Topology) -> Iterator[tuple[Where, str]]:
    for table, named in (("host", topology.hosts), ("lane", topology.lanes)):
        seen: set[str] = set()
        for index, each in enumerate(named):
            if each.name in seen:
                yield (table, index, "name"), wrong("name", each.name, f"one that no other {table} has")
            seen.add(each.name)


def _of_lanes(topology: Topology) -> Iterator[tuple[Where, str]]:
    known = [host.name for host in topology.hosts]
    for index, lane in enumerate(topology.lanes):
        if not NAME.fullmatch(lane.name):
            yield ("lane", index, "name"), wrong("name", lane.name, NAMED)
        if lane.name in TAKEN:
            yield ("lane", index, "name"), wrong("name", lane.name, "another: that one is the cluster's own")
        if not lane.hosts:
            yield ("lane", index, "hosts"), wrong("hosts", [], "names of hosts, one a process")
        for name in lane.hosts:
            if name not in known:
                yield ("lane", index, "hosts"), wrong("hosts", name, "one of " + ", ".join(known))
        if lane.hosts and (lane.tp < 1 or lane.tp % len(lane.hosts)):
            expected = f"a multiple of its {len(lane.hosts)} processes"
            yield ("lane", index, "mesh"), wrong("mesh", f"tp={lane.tp}", expected)


def _over_subscribed(topology: Topology) -> Iterator[tuple[Where, str]]:
    free = {host.name: len(host.devices) for host in topology.hosts}
    for index, lane in enumerate(topology.lanes):
        share = lane.tp // len(lane.hosts)
        for rank, name in enumerate(lane.hosts):
            if share > free[name]:
                have = len(topology.host(name).devices)
                words = f"hosts: {name} is over-subscribed: rank {rank} of {lane.name} takes {share} devices, "
                yield ("lane", index, "hosts"), words + f"and {free[name]} of its {have} are left"
                return
            free[name] -= share


def _of_spanning(topology: Topology) -> Iterator[tuple[Where, str]]:
    """Inside a lane the coordinator, gloo and NCCL know no passwords: they stay where nobody else is."""
    for index, lane in enumerate(topology.lanes):
        hosts = [topology.host(name) for name in dict.fromkeys(lane.hosts)]
        if len(lane.hosts) < 2 or not all(host.address for host in hosts):
            continue
        where = ("lane", index, "hosts")
        for host in hosts:
            found = ip(host.address)
            if host.address != LOCAL and (found is None or not private(found)):
                words = f"hosts: {lane.name} spans processes, whose talk knows no passwords; "
                yield where, words + f"the address of {host.name} must be a private or loopback IP address"
        away = [host.name for host in hosts if not host.loopback]
        if away and len(away) < len(hosts):
            yield (
                where,
                f"hosts: {lane.name} spans {', '.join(away)} and a loopback address, which those cannot reach",
            )
        if away and not topology.security.trusted_network:
            words = f"hosts: {lane.name} would talk without TLS between {', '.join(away)}; "
            yield where, words + "trusted_network = true in [security] allows it"


def _of_roles(lanes: Sequence[LaneSpec]) -> Iterator[tuple[Where, str]]:
    if not lanes:
        yield ("lane", 0, ""), "lane: got none; expected [[lane]] with name, role, mesh and hosts"
    for role, other in (("prefill", "decode"), ("decode", "prefill")):
        if lanes and all(lane.role == role for lane in lanes):
            yield ("lane", 0, "role"), f"role: got {role} lanes only; expected at least one of {other} or both"


def _of_front(topology: Topology) -> Iterator[tuple[Where, str]]:
    front, certs = topology.front, topology.security.certs
    try:
        listens = addresses.parse(front.address)
    except ConfigError:
        yield ("front", 0, "address"), wrong("address", front.address, "HOST:PORT")
        return
    if front.on and front.on not in (names := [host.name for host in topology.hosts]):
        yield ("front", 0, "on"), wrong("on", front.on, "one of " + ", ".join(names))
    away = [host.name for host in topology.hosts if not host.loopback]
    if listens.loopback and away:
        words = f"address: got one of loopback, which {away[0]} cannot reach; expected HOST:PORT that every host "
        yield ("front", 0, "address"), words + "reaches"
    if listens.host in ("0.0.0.0", "::") and any(host.address for host in topology.hosts):
        yield ("front", 0, "address"), "address: got any; expected the one where every host reaches the front"
    if certs is None and not listens.loopback:
        words = "address: got one that is not loopback, without TLS between processes; give certs in [security], "
        yield ("front", 0, "address"), words + "which serac certs init makes"


def check_for_others(topology: Topology) -> None:
    """Raise ConfigError for what lanes that others start need, to find the front and to be let in."""
    if topology.security.secret_file is None:
        raise ConfigError("secret_file: got none in [security]; expected a file that every host reads, since lanes "
                          "that others start are no children of the front", field="secret_file")  # fmt: skip
    if addresses.parse(topology.front.address).port == 0:
        raise ConfigError(
            "address: got no port in [front]; expected one, where lanes find the front", field="address"
        )


def private(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    return address.is_private and not address.is_unspecified and not address.is_multicast
