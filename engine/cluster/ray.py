"""A cluster over Ray: a placement group for each lane, and in it a task for each rank, which runs `serac worker`.

    bundle of a rank      {"CPU": 1, "GPU": 4, "node:10.0.0.1": 0.001}     the last keeps rank and host together
    task                  text of the topology, lane, rank -> runs the worker -> its exit code
    exit 75, killed ...   RestartWanted -> Ray runs the task again; 0, 2 and 78 are final

Ray passes strings and numbers and none of our objects; what the lanes say to each other goes by Serac's own ports.
Whoever is let in at Ray's own ports runs code: its token authentication and a trusted network keep others out.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import NamedTuple

from engine.cluster.become import become
from engine.cluster.commands import command, worker
from engine.cluster.found import Found
from engine.cluster.process import Command
from engine.cluster.reading import parse
from engine.cluster.rules import check_for_others
from engine.cluster.slurm import FINAL
from engine.cluster.topology import Placed, Topology, placed
from engine.errors import ConfigError, Unavailable

MOST_RESTARTS = 20
WAIT_S = 1.0  # before a rank is started again
PLACE_S = 10.0
SLIVER = 0.001  # of the resource that each node has by its own name

Task = Callable[[str, str, int, str], int]  # text of the topology, lane, rank, front -> exit code


class RestartWanted(Exception):
    """The process of a rank ended in a way that another start may mend."""


class Group(NamedTuple):
    """What Ray is asked to place together."""

    name: str
    strategy: str
    bundles: list[dict[str, float]]


def groups(topology: Topology) -> list[Group]:
    """A placement group for each lane."""
    ranks: dict[str, list[Placed]] = {}
    for each in placed(topology):
        ranks.setdefault(each.lane.name, []).append(each)
    return [Group(f"{topology.name}-{lane}", _strategy(mine), [_bundle(topology, each) for each in mine])
            for lane, mine in ranks.items()]  # fmt: skip


def _strategy(ranks: list[Placed]) -> str:
    hosts = {each.host.name for each in ranks}
    if len(hosts) == 1:
        return "STRICT_PACK"
    return "STRICT_SPREAD" if len(hosts) == len(ranks) else "PACK"


def _bundle(topology: Topology, each: Placed) -> dict[str, float]:
    bundle: dict[str, float] = {"CPU": 1}
    if topology.serve.get("device") != "cpu":
        bundle["GPU"] = len(each.devices)
    if not each.host.loopback:
        bundle[f"node:{each.host.address}"] = SLIVER
    return bundle


def planned(topology: Topology, found: Mapping[str, Found]) -> dict[tuple[str, int], Command]:
    """What the tasks would run on hosts that have what was `found`."""
    return {
        each.slot: command(topology, each, found[each.host.name], each.host.python,
                           worker(topology, each, topology.front.address))
        for each in placed(topology)
    }  # fmt: skip


def rank_task(text: str, lane: str, rank: int, front: str) -> int:
    """Run one rank where Ray put it. Raises RestartWanted."""
    made = become(parse(text, "topology"), lane, os.environ, rank, front)
    return tied(made.arguments, made.environment)


def tied(arguments: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run a command until it ends; when this process is killed, the command ends too. Raises RestartWanted."""
    words = [sys.executable, "-m", "engine.cluster.tied", *arguments]
    with subprocess.Popen(words, stdin=subprocess.PIPE, env=dict(environment)) as process:
        code = process.wait()
    if code in FINAL:
        return code
    time.sleep(WAIT_S)
    raise RestartWanted(f"exit code {code}")


class Started:
    """Lanes that run over Ray."""

    def __init__(self, library: ModuleType, made: list[object], refs: dict[tuple[str, int], object]):
        self._ray, self._groups, self._refs = library, made, refs

    def codes(self, timeout_s: float) -> dict[tuple[str, int], int]:
        """Exit codes of the ranks that have ended, after that time at most. Raises Ray's error for one given up."""
        refs = list(self._refs.values())
        done, _ = self._ray.wait(refs, num_returns=len(refs), timeout=timeout_s)
        return {slot: self._ray.get(ref) for slot, ref in self._refs.items() if ref in done}

    def stop(self) -> None:
        """End all ranks."""
        for ref in self._refs.values():
            self._ray.cancel(ref, force=True)
        for group in self._groups:
            self._ray.util.remove_placement_group(group)


def start(topology: Topology, text: str, front: str, address: str = "", task: Task = rank_task) -> Started:
    """Place and start every rank on the Ray of an address, by default this machine's or a new one.

    Raises ConfigError without Ray, secret or port of the front, Unavailable where there is no room.
    """
    check_for_others(topology)
    ray = library()
    if not ray.is_initialized():
        ray.init(address=address or None, include_dashboard=False)
    made: list[object] = []
    started = Started(ray, made, {})
    for lane, group in zip(topology.lanes, groups(topology), strict=True):
        made.append(ray.util.placement_group(group.bundles, strategy=group.strategy, name=group.name))
        if not made[-1].wait(PLACE_S):
            started.stop()
            raise Unavailable(f"lane {lane.name}: Ray found no room for {len(group.bundles)} ranks within "
                              f"{PLACE_S:.0f} s ({group.strategy}); see ray status")  # fmt: skip
    again = ray.remote(max_retries=MOST_RESTARTS, retry_exceptions=[RestartWanted])(task)
    refs = {}
    for lane, group, at in zip(topology.lanes, groups(topology), made, strict=True):
        for rank, bundle in enumerate(group.bundles):
            where = ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(at, rank)
            options = {"num_cpus": 1, "num_gpus": bundle.get("GPU", 0), "scheduling_strategy": where}
            refs[lane.name, rank] = again.options(**options).remote(text, lane.name, rank, front)
    return Started(ray, made, refs)


def library() -> ModuleType:
    """Ray itself. Raises ConfigError where it is not installed."""
    try:
        import ray
        import ray.util.scheduling_strategies
    except ImportError:
        raise ConfigError("over: got ray, which is not installed; pip install 'serac[ray]'", field="over") from None
    return ray
