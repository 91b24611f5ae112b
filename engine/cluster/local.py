"""The commands of a cluster whose hosts are all this machine: names for its devices, as tests and one server need.

    Placed -> Command(PYTHON -m engine.cli worker ..., environment of this process with what JAX needs)

A worker ends when its input ends, so it dies with whoever started it.
"""

import os
import sys
from collections.abc import Mapping

from engine.cluster.commands import command, kept, worker
from engine.cluster.found import Found, here
from engine.cluster.process import Command
from engine.cluster.topology import Topology, placed
from engine.errors import ConfigError


def find(topology: Topology) -> dict[str, Found]:
    """What this machine has, under the name of each host. Raises ConfigError for a host that is another machine."""
    if away := [host.name for host in topology.hosts if not host.loopback]:
        raise ConfigError(f"over: got local, and host {away[0]} is another machine; expected ssh", field="over")
    return {host.name: here(host.address, topology.autotune) for host in topology.hosts}


def commands(
    topology: Topology, found: Mapping[str, Found], environ: Mapping[str, str] | None = None
) -> dict[tuple[str, int], Command]:
    """How to start each process, by lane and rank. Raises ConfigError."""
    base, made = kept(os.environ if environ is None else environ), {}
    for each in placed(topology):
        words = worker(topology, each)
        one = command(topology, each, found[each.host.name], sys.executable, words)
        made[each.slot] = Command(one.arguments, {**base, **one.environment})
    return made
