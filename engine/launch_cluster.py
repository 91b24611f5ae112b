"""`serac launch FILE.toml`: a whole cluster from one file, over what the operator has.

    --dry-run             what would run where; over slurm and kubernetes the scripts and manifests, also into --out
    --over local, ssh     the front here, and with it every process of every lane
    --over slurm, ray     jobs, or tasks, for the lanes; kubernetes prints manifests for kubectl apply -f -
    --lane NAME           become the rank that the environment says: what jobs and pods run
    --front-only          the front alone, for lanes that others start

For a person a table; off a terminal one JSON object.
"""

import argparse
import json
import os
import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TextIO

from engine import front, launch
from engine.cluster import kubernetes, places, ray, reading, slurm
from engine.cluster.become import become
from engine.cluster.process import Command
from engine.cluster.rules import mistakes
from engine.cluster.topology import Topology, placed
from engine.cluster.yaml_text import yaml_of
from engine.config import Settings, whole
from engine.errors import ConfigError
from engine.replica.replica import Replica
from engine.tables import show_table

RANK = whole(0, 10_000)
READ_ONLY_BY_OWNER = 0o600
LONG = ("command", "environment")


def run(options: argparse.Namespace, version: str, out: TextIO) -> int:
    """Do what the options say; returns the exit code. Raises ConfigError, Unavailable."""
    topology = reading.read(options.file)
    if options.lane is not None:
        rank = RANK.given("--rank", options.rank)
        made = become(
            topology, options.lane, os.environ, None if rank is None else int(str(rank)), options.front or ""
        )
        if not options.dry_run:
            os.execvpe(made.arguments[0], list(made.arguments), dict(made.environment))
        return show({(options.lane, -1): made}, topology, "here", out)
    if options.log_dir is not None:
        topology = replace(topology, serve={**topology.serve, "log_dir": options.log_dir})
    if options.listen:
        topology = listening(topology, options.listen)
    if options.front_only:
        return start(topology, {}, version, out)
    over = places.chosen(topology, options.over)
    if over in ("slurm", "kubernetes"):
        return files(topology, over, options, out)
    if options.dry_run:
        return plan(topology, over, out)
    if over == "ray":
        return over_ray(topology, options, version, out)
    return start(topology, places.commands(topology, over), version, out)


def listening(topology: Topology, address: str) -> Topology:
    """The same with the front at another address, which keeps to the same rules. Raises ConfigError."""
    made = replace(topology, front=replace(topology.front, address=address))
    for _, words in mistakes(made):
        raise ConfigError(f"listen: {words}", field="listen")
    return made


def start(topology: Topology, commands: Mapping[tuple[str, int], Command], version: str, out: TextIO) -> int:
    """Serve the front with its processes until it is drained."""

    def build(settings: Settings, progress: front.Progress) -> Replica:
        return front.Front(settings, topology, commands).start(progress)

    return launch.serve(topology.settings, build, version, out)


def over_ray(topology: Topology, options: argparse.Namespace, version: str, out: TextIO) -> int:
    """The lanes as tasks of Ray, and the front here."""
    started = ray.start(topology, options.file.read_text(), topology.front.address, address=options.ray_address)
    try:
        return start(topology, {}, version, out)
    finally:
        started.stop()


def files(topology: Topology, over: str, options: argparse.Namespace, out: TextIO) -> int:
    """Scripts or manifests: into --out, or printed; scripts go to sbatch unless it is a dry run."""
    if over == "slurm":
        made = slurm.scripts(topology, options.file.resolve(), options.python)
    else:
        place = kubernetes.Place(options.image, options.namespace, options.models)
        text = options.file.read_text()
        made = {f"{topology.name}.yaml": yaml_of(kubernetes.manifests(topology, text, place))}
    if options.out is not None:
        for path in written(made, options.out):
            print(path, file=out)
    elif over == "kubernetes" or options.dry_run:
        for name, text in made.items():
            print(f"# {name}\n{text}", file=out, end="", flush=True)
    if over == "slurm" and not options.dry_run:
        for name, job in slurm.submit(made).items():
            print(f"{name}: job {job}", file=out)
    return 0


def written(made: Mapping[str, str], folder: Path) -> list[Path]:
    """Each text in a file of its own, which its owner alone reads. Raises ConfigError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in made.items():
            (folder / name).touch(READ_ONLY_BY_OWNER)
            (folder / name).write_text(text)
    except OSError as error:
        raise ConfigError(
            f"out: got {folder}; expected a folder to write in ({error.strerror})", field="out"
        ) from None
    return [folder / name for name in made]


def plan(topology: Topology, over: str, out: TextIO) -> int:
    """What would run where, asking no other host."""
    if over != "ray":
        found = None if over == "local" else places.assumed(topology)
        return show(places.commands(topology, over, found), topology, over, out)
    bundles = {(lane.name, rank): f"{group.strategy} {json.dumps(bundle)}"
               for lane, group in zip(topology.lanes, ray.groups(topology), strict=True)
               for rank, bundle in enumerate(group.bundles)}  # fmt: skip
    return show(ray.planned(topology, places.assumed(topology)), topology, over, out, bundles)


def show(
    commands: Mapping[tuple[str, int], Command],
    topology: Topology,
    over: str,
    out: TextIO,
    bundles: Mapping[tuple[str, int], str] | None = None,
) -> int:
    """One row a process; for a person also the commands, as a shell would take them."""
    more = {slot: {"placement": words} for slot, words in (bundles or {}).items()}
    rows = [row(slot, command, topology) | more.get(slot, {}) for slot, command in commands.items()]
    if out.isatty():
        short = [{name: value for name, value in each.items() if name not in LONG} for each in rows]
        show_table(f"{topology.name} over {over}", short, out)
        for each in rows:
            words = " ".join(str(each[name]) for name in reversed(LONG) if each[name])
            print(f"\n# {each['lane']} rank {each['rank']} on {each['host']}\n{words}", file=out)
    else:
        print(json.dumps({"cluster": topology.name, "over": over, "processes": rows}), file=out, flush=True)
    return 0


def row(slot: tuple[str, int], command: Command, topology: Topology) -> dict[str, object]:
    """A process in words; of its environment what differs from ours."""
    where = next((each for each in placed(topology) if each.slot == slot), None)
    own = {name: value for name, value in command.environment.items() if os.environ.get(name) != value}
    place = {} if where is None else {"host": where.host.name, "devices": ",".join(map(str, where.devices))}
    return {
        "host": "",
        "lane": slot[0],
        "rank": slot[1],
        "devices": "",
        **place,
        "command": shlex.join(command.arguments),
        "environment": " ".join(f"{name}={shlex.quote(value)}" for name, value in sorted(own.items())),
    }
