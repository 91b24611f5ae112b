"""From settings to the lane of one worker process, which a front elsewhere serves with."""

import json
import logging
import secrets
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh
from prometheus_client import CollectorRegistry

from engine.clock import SystemClock
from engine.config import Settings
from engine.core import prefix
from engine.core.agent import Agent
from engine.core.scheduler import Scheduler
from engine.lanes import LaneSpec
from engine.models.config import ModelConfig, from_hf
from engine.movers.geometry import Geometry
from engine.movers.local import host_shards
from engine.movers.parts import Heads
from engine.observe.metrics import Metrics
from engine.observe.plan_bytes import Bounds
from engine.planning import Choice
from engine.replica.build import (
    Progress,
    block_bytes_of,
    choose,
    describe,
    kv_kind,
    make_runner,
    move_sizes_of,
    open_plan_log,
    plan_header,
    shape_of,
    use_compile_cache,
)
from engine.replica.lane import Courier, Device, Lane
from engine.replica.moves import Bytes
from engine.replica.recorded import Recorded
from engine.runner.moves import Staged, staged_tile
from engine.runner.state import pool_dtype
from engine.text.text import Text
from engine.weights.source import ModelFolder, resolve
from engine.weights.tensors import check_vocabulary, choose_dtype
from pallas_kernels.dispatch import platform_of

logger = logging.getLogger("serac.build")


class Built(NamedTuple):
    """A lane that may live many times, until `close`. facts: what its front must know, as JSON takes it.

    make_lane  called with a name, a courier and the device, which may be spread over processes
    """

    make_lane: Callable[[str, Courier, Device], Lane]
    names: Callable[[], str]
    geometry: Geometry
    content: Bytes
    facts: dict[str, object]
    device: Device
    bounds: Bounds
    tp: int
    close: Callable[[], None]


class Chosen(NamedTuple):
    """A lane before its weights are read: what its processes compare first."""

    folder: ModelFolder
    config: ModelConfig
    text: Text
    lanes: tuple[LaneSpec, ...]
    mesh: Mesh
    choice: Choice
    geometry: Geometry


def choose_lane(settings: Settings) -> Chosen:
    """The model, the mesh over the devices of all processes, the sizes. Raises ConfigError or ModelError."""
    folder = resolve(settings.model)
    config = from_hf(folder.config())
    text = Text(folder.path)
    check_vocabulary(text.vocab, config)
    lanes, (mesh,), (choice,) = choose(settings, config, choose_dtype("auto", folder.config()))
    held = pool_dtype(choice.dtype, platform_of(mesh.devices.flat[0]), choice.sizes.kv_dtype)
    width, dtype = staged_tile(config.head_width, held)
    geometry = Geometry(
        config.num_layers,
        config.kv_heads,
        width,
        dtype.name,
        choice.sizes.block_size,
        folder.revision,
        f"{settings.numerics}, {kv_kind(choice)}",
    )
    return Chosen(folder, config, text, lanes, mesh, choice, geometry)


def lane(
    settings: Settings,
    slot: str,
    chosen: Chosen,
    progress: Progress,
    together: Callable[[str], None] | None = None,
    logged: bool = True,
) -> Built:
    """Weights on this process's devices, programs compiled. Raises ConfigError or ModelError.

    together  as Runner.warm_up has it; logged: whether this process keeps the lane's plan log, if there is one
    """
    folder, config, text, lanes, mesh, choice, geometry = chosen
    use_compile_cache(settings.compile_cache)
    moved = move_sizes_of(config, config.kv_heads, choice, mesh)
    runner = make_runner(settings, folder, config, choice, mesh, progress, moved, together)
    runner.compiles.seal()
    metrics, clock = Metrics(CollectorRegistry()), SystemClock()
    header = plan_header(slot, settings.model, folder, config, choice, mesh)
    log = open_plan_log(settings, header, metrics) if logged else None
    sizes, eos_ids = choice.sizes, tuple(text.eos_ids)
    root = prefix.root(folder.revision, settings.numerics, kv_kind(choice), str(sizes.block_size))
    shape = shape_of(settings, choice, config, eos_ids)

    def make_lane(name: str, courier: Courier, device: Device) -> Lane:
        device = device if log is None else Recorded(device, log)
        device.reset()
        agent = Agent(name, Scheduler(shape, root), max(moved))
        return Lane(agent, device, clock, metrics, courier, lambda: runner.compiles.late)

    facts = {
        "name": folder.name,
        "folder": str(folder.path),
        "revision": folder.short_revision,
        "root": root.hex(),
        "context": sizes.max_length,
        "vocab": config.vocab,
        "eos_ids": list(eos_ids),
        "block_size": sizes.block_size,
        "block_bytes": block_bytes_of(config, config.kv_heads, choice),
        "num_blocks": sizes.num_blocks,
        "describe": describe(folder, config, lanes, choice, [runner]),
    }
    return Built(
        make_lane,
        lambda: f"{slot}.{secrets.token_hex(6)}",
        geometry,
        Bytes(leave, arrive),
        plain(facts),
        runner,
        header.bounds,
        mesh.size,
        log.close if log is not None else lambda: None,
    )


def leave(staged: object, count: int) -> object:
    """What a device gathered, on the host, shard by shard; waits for it."""
    assert isinstance(staged, tuple)
    return host_shards(staged, count)


def arrive(staged: object) -> object:
    """What came over a link, as the device takes it."""
    assert isinstance(staged, Heads)
    return Staged(*staged[:2])


def plain(facts: dict[str, object]) -> dict[str, object]:
    """`facts` as JSON has them."""
    whole: dict[str, object] = json.loads(json.dumps(facts, default=lambda value: np.asarray(value).tolist()))
    return whole
