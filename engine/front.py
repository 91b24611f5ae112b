"""A front without a model: lanes in worker processes of this machine, one each, and the replica that serves them.

    Supervisor starts workers -> all ready: their facts -> Replica listens for lanes -> each worker told how to join
    a worker ends: its lane is given up at once, what it served goes on elsewhere, and it is started again

It never imports jax: a device that fails takes its own worker along and nothing else.
"""

import os
import secrets
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from prometheus_client import CollectorRegistry

from engine.clock import SystemClock
from engine.cluster.supervisor import Command, Supervisor
from engine.config import ROWS, Settings
from engine.core.request import Limits
from engine.environment import gpu_problem
from engine.errors import ConfigError, Unavailable
from engine.lanes import LaneSpec, parse_lanes, spoken
from engine.movers import addresses
from engine.observe.metrics import Metrics
from engine.replica.loads import GIVEN_UP, STARTING, LaneLoad
from engine.replica.replica import ModelInfo, Replica
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
)
LISTEN = "127.0.0.1:0"
JOIN_S = 30.0
JOIN_POLL_S = 0.05

Progress = Callable[[str, int, int], None]  # (what, done, of)


def replica(settings: Settings, progress: Progress) -> Replica:
    """A replica whose lanes are processes. Raises ConfigError when a worker cannot be started, Unavailable."""
    return Front(settings).start(progress)


class Front:
    """The workers of a replica and how they join it."""

    def __init__(self, settings: Settings):
        self._settings, self._lanes = settings, _lanes(settings)
        self._secret = secrets.token_bytes(32)
        self._replica: Replica | None = None  # until all workers are ready
        self._folder = ""  # of the sockets where lanes listen for each other
        self._supervisor = Supervisor(_commands(settings, self._lanes), self._told)

    def start(self, progress: Progress) -> Replica:
        """Start the workers and wait until each has joined."""
        facts = self._supervisor.start(progress)
        made = _replica(self._settings, self._lanes, facts)
        folder = tempfile.TemporaryDirectory(prefix="serac-", ignore_cleanup_errors=True)
        self._folder = folder.name
        made.on_stop += [folder.cleanup, self._supervisor.stop]  # the last is the first
        made.serve_remote(self._secret, [LISTEN])
        made.absent = self._absent
        self._replica = made
        for slot in self._supervisor.workers:
            self._join(slot, made)
        until = time.monotonic() + JOIN_S
        while (joined := len(made.router.lanes)) < len(self._lanes):
            progress("lanes joining", joined, len(self._lanes))
            if time.monotonic() > until:
                made.stop()
                raise Unavailable(f"workers: {joined} of {len(self._lanes)} lanes joined within {JOIN_S:.0f} s")
            time.sleep(JOIN_POLL_S)
        return made

    def _told(self, slot: str, words: dict) -> None:
        """What a worker says, or that it has ended; on a thread of the worker's."""
        if (made := self._replica) is None or made.remote is None:
            return
        if words["event"] == "exit" and words.get("name"):
            made.remote.lost(words["name"])
        elif words["event"] == "ready":
            self._join(slot, made)

    def _join(self, slot: str, made: Replica) -> None:
        """Tell a worker where the front listens, where it shall, and what proves that it may come."""
        assert made.remote is not None
        words = {
            "front": made.remote.links.addresses[0],
            "secret": self._secret.hex(),
            "listen": self._listen(slot),
        }
        self._supervisor.workers[slot].say(words)

    def _listen(self, slot: str) -> str:
        """Where lanes find this one: at a unix socket, so that they share memory, unless its path is too long."""
        address = f"unix:{self._folder}/{slot}.sock"
        try:
            addresses.parse(address)
        except ConfigError:
            return LISTEN
        return address

    def _absent(self, present: list[str]) -> list[LaneLoad]:
        """The lanes whose process is not there now."""
        there = {name.split(".")[0] for name in present}
        workers = self._supervisor.workers
        states = {slot: GIVEN_UP if worker.given_up else STARTING for slot, worker in workers.items()}
        missing = [lane for lane in self._lanes if lane.name not in there]
        return [LaneLoad(lane.name, lane.role, states[lane.name]) for lane in missing]


def _lanes(settings: Settings) -> tuple[LaneSpec, ...]:
    """The lanes to start. Raises ConfigError for what does not go with workers."""
    if settings.lanes is None:
        raise ConfigError("workers: got no --lanes; expected lanes to start, such as 'prefill:tp=1, decode:tp=1'")
    if settings.mesh != "auto":
        raise ConfigError("lanes: got --mesh as well; expected one of the two", field="lanes")
    return parse_lanes(settings.lanes)


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
        "workers": len(lanes),
    }


def _commands(settings: Settings, lanes: tuple[LaneSpec, ...]) -> dict[str, Command]:
    on_cpu = settings.device == "cpu" or gpu_problem() is not None
    given = [f"--{name.replace('_', '-')}={_spelled(value)}" for name, value in _given(settings).items()]
    commands, first = {}, 0
    for lane in lanes:
        environment = {name: value for name, value in os.environ.items() if name not in _variables()}
        if not on_cpu:
            visible = environment.get("CUDA_VISIBLE_DEVICES")
            numbers = visible.split(",") if visible else [str(k) for k in range(first + lane.tp)]
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(numbers[first : first + lane.tp])
        arguments = [sys.executable, "-m", "engine.cli", "worker", settings.model, f"--mesh=tp={lane.tp}", *given]
        commands[lane.name] = Command([*arguments, f"--lane={lane.name}", f"--role={lane.role}"], environment)
        first += lane.tp
    return commands


def _given(settings: Settings) -> dict[str, object]:
    values = {name: getattr(settings, name) for name in ROWS if name not in (*NOT_FOR_WORKERS, "model")}
    return {name: value for name, value in values.items() if value is not None and value != ROWS[name].default}


def _spelled(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _variables() -> set[str]:
    """Settings that a worker must not read from the environment, as it gets them by argument."""
    return {row.variable for row in ROWS.values()} | {"SERAC_CONFIG", "XLA_FLAGS"}
