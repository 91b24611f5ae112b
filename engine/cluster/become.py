"""The command of the rank that this process is, where Slurm, Kubernetes or Ray started it.

    serac launch FILE.toml --lane=p0  ->  rank from the environment  ->  exec python -m engine.cli worker ...

The same file gives every rank its devices, so what the engine says must agree with it. Devices that the engine gave
go before those of the file: Slurm names them in CUDA_VISIBLE_DEVICES, and a pod sees its own from 0 on.
"""

import ipaddress
import re
import sys
from collections.abc import Mapping

from engine.cluster.commands import command, kept, worker
from engine.cluster.found import here
from engine.cluster.process import Command
from engine.cluster.ranks import LWS, rank_of
from engine.cluster.rules import private
from engine.cluster.topology import Placed, Topology, placed
from engine.errors import ConfigError

POD_IP = "POD_IP"
DEVICES = "CUDA_VISIBLE_DEVICES"


def become(
    topology: Topology, lane: str, environ: Mapping[str, str], rank: int | None = None, front: str = ""
) -> Command:
    """What to run instead of this process. Raises ConfigError where the environment and the topology disagree."""
    said = rank_of(environ, topology.lane(lane), rank)
    mine = next(each for each in placed(topology) if each.slot == (lane, said.rank))
    if said.by == LWS:
        mine = mine._replace(devices=tuple(range(len(mine.devices))))
    elif environ.get(DEVICES):
        mine = mine._replace(devices=given(environ[DEVICES], mine))
    address = environ.get(POD_IP) or mine.host.address
    check_address(mine, address)
    words = worker(topology, mine, front or topology.front.address, address)
    found = command(topology, mine, here(address, topology.autotune), sys.executable, words)
    return Command(found.arguments, {**kept(environ), **found.environment})


def given(words: str, mine: Placed) -> tuple[int, ...]:
    """The devices that the engine gave to this rank, alone or with those of its lane on the same host, in order.

    Raises ConfigError where they are not as many as it takes.
    """
    numbers, take = words.split(","), len(mine.devices)
    if len(numbers) == take * mine.lane.hosts.count(mine.host.name):
        before = mine.lane.hosts[: mine.rank].count(mine.host.name)
        numbers = numbers[take * before : take * (before + 1)]
    if len(numbers) != take or not all(re.fullmatch(r"\d{1,4}", each, re.ASCII) for each in numbers):
        raise ConfigError(f"{DEVICES}: got {len(numbers)} devices; expected {len(mine.devices)} numbers, for rank "
                          f"{mine.rank} of {mine.lane.name}", field=DEVICES)  # fmt: skip
    return tuple(map(int, numbers))


def check_address(mine: Placed, address: str) -> None:
    """Raise ConfigError where others of the lane could not, or strangers could, reach this rank."""
    if not address:
        raise ConfigError(f"address: host {mine.host.name} has none in the topology, and {POD_IP} is not set; "
                          "expected one of them", field="address")  # fmt: skip
    try:
        inside = private(ipaddress.ip_address(address))
    except ValueError:
        return  # a name, which no lane over several processes may have
    if len(mine.lane.hosts) > 1 and not inside:
        raise ConfigError(f"address: that of rank {mine.rank} of {mine.lane.name} is public; expected one that is "
                          "private, since the talk inside a lane knows no passwords", field="address")  # fmt: skip
