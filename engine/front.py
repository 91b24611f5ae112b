"""A front without a model: lanes in processes of their own, one each or several, and the replica that serves them.

    Supervisor starts them -> all ready: their facts -> Replica listens for lanes -> each process told how to join
    one ends: its lane is given up at once, what it served goes on elsewhere, and the lane is started again

It never imports jax: a device that fails takes its own worker along and nothing else.
"""

import os
import secrets
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from prometheus_client import CollectorRegistry

from engine import certificates
from engine.clock import SystemClock
from engine.cluster import local
from engine.cluster.commands import LANE, SECRET_FILE
from engine.cluster.process import Command, Seat
from engine.cluster.rank_logs import RankLogs
from engine.cluster.reading import of_lanes
from engine.cluster.supervisor import Supervisor
from engine.cluster.topology import Host, Topology
from engine.config import ROWS, Settings
from engine.core.membership import Line
from engine.core.messages import FRONT
from engine.core.request import Limits
from engine.errors import ConfigError, Unavailable
from engine.lanes import LaneSpec, spoken
from engine.movers import addresses
from engine.movers.greeting import read_secret
from engine.movers.links import Links
from engine.movers.tls import Tls
from engine.observe.metrics import Metrics
from engine.reception import Reception
from engine.replica.loads import GIVEN_UP, STARTING, LaneLoad, Standing
from engine.replica.pairing import Pairing
from engine.replica.remote import Remote
from engine.replica.replica import ModelInfo, Replica
from engine.rolling import Rolling, standing
from engine.text.text import Text

NOT_FOR_WORKERS = (
    "lanes",
    "workers",
    "mesh",
    "host",
    "port",
    "admin_host",
    "admin_port",
    "metrics_port",
    "download",
    "log_dir",
)
SECRET = "SERAC_CLUSTER_SECRET"
JOIN_S = 30.0
JOIN_POLL_S = 0.05

Process = TypeVar("Process")
Progress = Callable[[str, int, int], None]  # (what, done, of)


def replica(settings: Settings, progress: Progress) -> Replica:
    """A replica whose lanes are processes of this machine. Raises ConfigError when one cannot be started."""
    topology = here(settings)
    commands = local.commands(topology, local.find(topology))
    return Front(settings, topology, commands).start(progress)


class Front:
    """The processes of a replica and how they join it. `commands` by lane and rank; none: others start them."""

    def __init__(self, settings: Settings, topology: Topology, commands: Mapping[tuple[str, int], Command]):
        self._settings, self._topology = settings, topology
        certs = topology.security.certs
        self._tls = None if certs is None else Tls(certs / FRONT)
        self._secret = secret_of(topology, bool(commands))
        self._replica: Replica | None = None  # until all lanes are ready
        self._remote: Remote | None = None
        self._links = Links(FRONT, self._secret, self._hear, self._gone, tls=self._tls)
        self._folder = tempfile.TemporaryDirectory(prefix="serac-", ignore_cleanup_errors=True)
        slots = [(lane, rank) for lane in topology.lanes for rank in range(len(lane.hosts))]
        seats = {(lane.name, rank): Seat(rank, lane.hosts[rank]) for lane, rank in slots} if not commands else {}
        self._reception = Reception(seats, self._links.post)
        logs = RankLogs(settings.log_dir)
        self._supervisor = Supervisor(grouped(commands or seats), self._told, self._certificates, logs)

    def start(self, progress: Progress) -> Replica:
        """Start the processes, or wait for those that others start, until every lane has joined."""
        lanes = self._topology.lanes
        self._links.start([self._topology.front.address])
        try:
            facts = self._supervisor.start(progress)
            made = _replica(self._settings, lanes, facts)
        except BaseException:
            self._supervisor.stop()
            self._links.close()
            self._folder.cleanup()
            raise
        made.on_stop += [self._folder.cleanup, self._supervisor.stop]  # the last is the first
        self._remote = made.serve_remote(self._links)
        made.absent, made.standing = self._absent, self._standing
        made.restart = Rolling(lanes, self._supervisor.workers, made).restart
        if shared(self._topology):
            made.pairing = Pairing(self._secret, bytes.fromhex(facts[lanes[0].name]["root"]), self._tls)
        made.on_reload.append(self.reload)
        self._replica = made
        for slot in self._supervisor.workers:
            self._join(slot)
        until = time.monotonic() + JOIN_S
        while (joined := len(made.router.lanes)) < len(lanes):
            progress("lanes joining", joined, len(lanes))
            if time.monotonic() > until:
                made.stop()
                raise Unavailable(f"workers: {joined} of {len(lanes)} lanes joined within {JOIN_S:.0f} s")
            time.sleep(JOIN_POLL_S)
        return made

    def reload(self) -> None:
        """Certificates that are new: for ours, and for the processes that we started."""
        if self._tls is not None and self._tls.reload() and (files := self._certificates()) is not None:
            for worker in self._supervisor.workers.values():
                worker.say([{"tls": files}] * len(worker.processes))

    def _certificates(self) -> dict[str, str] | None:
        """Those of lanes, for a process that is started on a host that has none."""
        certs = self._topology.security.certs
        return None if certs is None else certificates.read(certs / LANE)

    def _hear(self, sender: str, message: object) -> None:
        """What comes over the links, on their thread."""
        if isinstance(message, Line):
            self._reception.heard(sender, message)
        elif (remote := self._remote) is not None:
            remote.hear(sender, message)

    def _gone(self, peer: str) -> None:
        if self._reception.gone(peer):
            self._links.forget(peer)  # the next one has another name
        if (remote := self._remote) is not None:
            remote.gone(peer)

    def _told(self, slot: str, words: dict) -> None:
        """What a lane's processes say, or that they have ended; on a thread of theirs."""
        if (remote := self._remote) is None or self._replica is None:
            return
        if words["event"] == "exit" and words.get("name"):
            remote.gone(words["name"])
        elif words["event"] == "ready":
            self._join(slot)

    def _join(self, slot: str) -> None:
        """Tell each process where the front listens, where it shall, and what proves that it may come."""
        words = {"front": self._links.addresses[0], "secret": self._secret.hex()}
        hosts = [self._topology.host(name) for name in self._topology.lane(slot).hosts]
        listen = [listens(self._folder.name, slot, rank, host) for rank, host in enumerate(hosts)]
        self._supervisor.workers[slot].say([{**words, "listen": each} for each in listen])

    def _absent(self, present: list[str]) -> list[LaneLoad]:
        """The lanes whose process is not there now."""
        there = {name.split(".")[0] for name in present}
        workers = self._supervisor.workers
        states = {slot: GIVEN_UP if worker.given_up else STARTING for slot, worker in workers.items()}
        missing = [(lane.name, lane.role) for lane in self._topology.lanes if lane.name not in there]
        return [LaneLoad(name, role, states[name], {}, self._standing(name)) for name, role in missing]

    def _standing(self, slot: str) -> Standing:
        """A lane's processes, with the hosts as the operator calls them."""
        return standing(self._supervisor.workers[slot], self._topology.lane(slot).hosts)


def listens(folder: str, slot: str, rank: int, host: Host) -> str:
    """Where others find a process: on this machine at a unix socket, to share memory; else empty, as it chooses."""
    address = f"unix:{folder}/{slot}.{rank}.sock"
    try:
        addresses.parse(address)
    except ConfigError:  # its path is too long
        return ""
    return address if host.loopback else ""


def secret_of(topology: Topology, ours: bool) -> bytes:
    """The cluster's secret: new each time where we hand it out ourselves. Raises ConfigError."""
    if (file := topology.security.secret_file) is not None:
        return read_secret({SECRET_FILE: str(file)})
    return secrets.token_bytes(32) if ours and not shared(topology) else read_secret(os.environ)


def shared(topology: Topology) -> bool:
    """Whether somebody gave the secret, who may have given it to other clusters too."""
    return topology.security.secret_file is not None or bool({SECRET, SECRET_FILE} & os.environ.keys())


def grouped(processes: Mapping[tuple[str, int], Process]) -> dict[str, list[Process]]:
    """By lane, in the order of ranks, what is given by lane and rank."""
    found: dict[str, list[Process]] = {}
    for (lane, _), each in sorted(processes.items()):
        found.setdefault(lane, []).append(each)
    return found


def here(settings: Settings) -> Topology:
    """The lanes of `settings`, all on this machine. Raises ConfigError for what does not go with workers."""
    if settings.lanes is None:
        raise ConfigError("workers: got no --lanes; expected lanes to start, such as 'prefill:tp=1, decode:tp=1'")
    if settings.mesh != "auto":
        raise ConfigError("lanes: got --mesh as well; expected one of the two", field="lanes")
    given = {name: getattr(settings, name) for name in ROWS if name not in NOT_FOR_WORKERS}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    numbers = tuple(int(number) for number in visible) if all(map(str.isdecimal, visible)) else ()
    return of_lanes(settings.lanes, {name: value for name, value in given.items() if value is not None}, numbers)


def _replica(settings: Settings, lanes: tuple[LaneSpec, ...], facts: Mapping[str, dict]) -> Replica:
    first = facts[lanes[0].name]
    if odd := [slot for slot, other in facts.items() if other["root"] != first["root"]]:
        raise ConfigError(f"workers: {', '.join(odd)} would serve another revision than {lanes[0].name}")
    blocks = min(each["num_blocks"] for each in facts.values())
    eos_ids = tuple(first["eos_ids"])
    name = settings.served_model_name or first["name"]
    text = Text(Path(first["folder"]))
    info = ModelInfo(name, first["revision"], first["context"], first["vocab"], eos_ids, text.defaults)
    size = first["block_size"]
    limits = Limits(first["vocab"], first["context"], (blocks - 1) * size, size, eos_ids)
    root = bytes.fromhex(first["root"])
    made = Replica(
        info,
        text,
        limits,
        SystemClock(),
        Metrics(CollectorRegistry()),
        root,
        max_open=settings.max_calls,
        max_wait_s=settings.max_wait,
    )
    made.block_bytes = first["block_bytes"]
    made.late_compiles = lambda: sum(lane.load.late_compiles for lane in made.router.lanes.values() if lane.load)
    made.describe = described(lanes, [facts[lane.name]["describe"] for lane in lanes])
    return made


def described(lanes: tuple[LaneSpec, ...], workers: list[dict]) -> dict[str, object]:
    """What runs where, of all workers: bytes are those of the device that holds most, blocks those of the least."""
    largest = {name: max(each[name] for each in workers) for name in workers[0] if name.endswith("_bytes")}
    return {
        **workers[0],
        **largest,
        "lanes": spoken(lanes),
        "devices": sum(lane.tp for lane in lanes),
        "lane_axes": {lane.name: each["lane_axes"] for lane, each in zip(lanes, workers, strict=True)},
        "num_blocks": min(each["num_blocks"] for each in workers),
        "compile_seconds": round(sum(each["compile_seconds"] for each in workers), 2),
        "workers": sum(len(lane.hosts) for lane in lanes),
    }
