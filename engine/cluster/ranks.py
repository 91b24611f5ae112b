"""Which rank of its lane a process is, where an engine that we do not run started it.

    Slurm             SLURM_PROCID of SLURM_NTASKS, on SLURMD_NODENAME of SLURM_JOB_NODELIST
    LeaderWorkerSet   LWS_WORKER_INDEX of LWS_GROUP_SIZE
    flags             --rank of --processes

Ranks are the order of lane.hosts. What two of them say differently, or otherwise than lane.hosts, is refused: a
group whose ranks are mixed up would wait for itself, or give wrong answers.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

from engine.errors import ConfigError
from engine.lanes import LaneSpec

MOST_NODES = 10_000
SLURM, LWS, FLAGS = "Slurm", "LeaderWorkerSet", "flags"
VARIABLES = {SLURM: ("SLURM_PROCID", "SLURM_NTASKS"), LWS: ("LWS_WORKER_INDEX", "LWS_GROUP_SIZE")}


class Rank(NamedTuple):
    """A rank and who said it."""

    rank: int
    by: str


def rank_of(environment: Mapping[str, str], lane: LaneSpec, rank: int | None = None) -> Rank:
    """The rank of this process. Raises ConfigError when nobody says it, or when it disagrees."""
    said = [found for by in VARIABLES if (found := _said(environment, lane, by))]
    said += [] if rank is None else [Rank(rank, FLAGS)]
    if not said:
        raise ConfigError(f"rank: nothing says which rank of {lane.name} this is; give --rank, or start it by srun "
                          "or a LeaderWorkerSet", field="rank")  # fmt: skip
    for other in said[1:]:
        if other.rank != said[0].rank:
            raise ConfigError(f"rank: {said[0].by} says {said[0].rank}, and {other.by} {other.rank}; expected one "
                              "alone, or the same", field="rank")  # fmt: skip
    if not 0 <= said[0].rank < len(lane.hosts):
        raise ConfigError(f"rank: {said[0].by} says {said[0].rank}; expected 0..{len(lane.hosts) - 1}, since "
                          f"{lane.name} has {len(lane.hosts)} hosts", field="rank")  # fmt: skip
    _check_slurm(environment, lane, said[0].rank)
    return said[0]


def _said(environment: Mapping[str, str], lane: LaneSpec, by: str) -> Rank | None:
    """What one engine says; None where it says nothing."""
    words = [environment.get(name) for name in VARIABLES[by]]
    if words[0] is None:
        return None
    for name, word in zip(VARIABLES[by], words, strict=True):
        if word is None or not re.fullmatch(r"\d{1,6}", word, re.ASCII):
            raise ConfigError(f"{name}: expected a number, as {by} sets it", field=name)
    if int(words[1] or 0) != len(lane.hosts):
        name = VARIABLES[by][1]
        raise ConfigError(
            f"{name}: got {words[1]}; expected {len(lane.hosts)}, the hosts of {lane.name}", field=name
        )
    return Rank(int(words[0]), by)


def _check_slurm(environment: Mapping[str, str], lane: LaneSpec, rank: int) -> None:
    """Raise ConfigError where Slurm put the ranks on other nodes than lane.hosts says."""
    if "SLURM_PROCID" not in environment:
        return
    nodes, node = environment.get("SLURM_JOB_NODELIST"), environment.get("SLURMD_NODENAME")
    if nodes is not None and (missing := sorted(set(lane.hosts) - set(nodes_of(nodes)))):
        raise ConfigError(f"SLURM_JOB_NODELIST: {missing[0]} is not in it; expected every host of {lane.name}",
                          field="SLURM_JOB_NODELIST")  # fmt: skip
    if node is not None and node != lane.hosts[rank]:
        raise ConfigError(f"SLURMD_NODENAME: rank {rank} of {lane.name} is on {node}; expected {lane.hosts[rank]}, "
                          "as srun --distribution=arbitrary does", field="SLURMD_NODENAME")  # fmt: skip


def nodes_of(text: str) -> list[str]:
    """The names in a node list of Slurm: `n[1-3,07],m` are n1, n2, n3, n07, m. Raises ConfigError."""
    found: list[str] = []
    for item in re.findall(r"(?:[^,\[\]]|\[[^\]]*\])+", text):
        match = re.fullmatch(r"([^\[\]]*)(?:\[([^\]]*)\](.*))?", item)
        if match is None:
            raise ConfigError("SLURM_JOB_NODELIST: expected names such as n[1-3,07],m", field="SLURM_JOB_NODELIST")
        ends = nodes_of(match[3]) if match[3] else [""]
        middles = [number for part in (match[2] or "").split(",") for number in _numbers(part)]
        if len(found) + len(middles) * len(ends) > MOST_NODES:
            raise ConfigError(f"SLURM_JOB_NODELIST: more than {MOST_NODES} names", field="SLURM_JOB_NODELIST")
        found += [match[1] + middle + end for middle in middles for end in ends]
    return found


def _numbers(part: str) -> list[str]:
    """`1-3` are 1, 2, 3; `07` is 07; nothing is itself."""
    match = re.fullmatch(r"(\d{1,9})-(\d{1,9})", part, re.ASCII)
    if match is None:
        return [part]
    first, last = int(match[1]), int(match[2])
    if last - first > MOST_NODES:
        raise ConfigError(f"SLURM_JOB_NODELIST: more than {MOST_NODES} names", field="SLURM_JOB_NODELIST")
    return [f"{number:0{len(match[1])}d}" for number in range(first, last + 1)]
