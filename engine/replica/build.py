"""From settings to a running replica: the only place that knows every class.

    resolve model -> config, tokenizer -> meshes -> for each lane: weights, pool, programs compiled -> replica

Everything that can be refused is refused before weights are read, and weights before programs are compiled.
"""

import importlib.metadata
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh
from prometheus_client import CollectorRegistry

from engine.clock import Clock, SystemClock
from engine.config import Settings
from engine.core import prefix
from engine.core.agent import Agent
from engine.core.request import Limits
from engine.core.scheduler import LaneShape, Scheduler
from engine.environment import programs_folder
from engine.errors import ConfigError, wrong
from engine.lanes import LaneSpec, alike, move, parse_lanes, spoken
from engine.models.config import ModelConfig, from_hf
from engine.movers.courier import LocalCourier
from engine.movers.local import Carrier
from engine.observe.metrics import Metrics
from engine.observe.plan_log import Header
from engine.observe.plan_writer import PlanWriter, open_log
from engine.planning import Choice, Device, decide
from engine.replica.lane import Lane
from engine.replica.recorded import Recorded
from engine.replica.replica import ModelInfo, Replica
from engine.runner.buckets import COARSE, FINE, buckets
from engine.runner.moves import move_sizes
from engine.runner.runner import Model, Runner
from engine.runner.state import head_bytes, pool_dtype
from engine.text.text import Text
from engine.weights.load import load
from engine.weights.source import ModelFolder, resolve
from engine.weights.tensors import check_vocabulary, choose_dtype
from pallas_kernels.dispatch import platform_of, target_of
from sharding.mesh import MeshSpec, check_devices, lane_meshes, parse_mesh, valid_sizes
from sharding.overlap import overlaps

logger = logging.getLogger("serac.build")

Progress = Callable[[str, int, int], None]  # (what, done, of)


def replica(settings: Settings, progress: Progress = lambda *_: None, clock: Clock | None = None) -> Replica:
    """A replica that is ready to start. Raises ConfigError or ModelError, naming what to change."""
    folder = resolve(settings.model)
    config = from_hf(folder.config())
    text = Text(folder.path)
    check_vocabulary(text.vocab, config)
    lanes, meshes, choices = choose(settings, config, choose_dtype("auto", folder.config()))
    use_compile_cache(settings.compile_cache)
    name, eos_ids = settings.served_model_name or folder.name, tuple(text.eos_ids)
    sizes = min((choice.sizes for choice in choices), key=lambda sizes: sizes.num_blocks)
    info = ModelInfo(name, folder.short_revision, sizes.max_length, config.vocab, eos_ids, text.defaults)
    limits = Limits(
        config.vocab, sizes.max_length, (sizes.num_blocks - 1) * sizes.block_size, sizes.block_size, eos_ids
    )
    root = prefix.root(folder.revision, settings.numerics, kv_kind(choices[0]), str(sizes.block_size))
    metrics, clock = Metrics(CollectorRegistry()), clock or SystemClock()
    made = Replica(
        info, text, limits, clock, metrics, root, max_open=settings.max_calls, max_wait_s=settings.max_wait
    )
    logs = [
        open_plan_log(settings, plan_header(lane.name, settings.model, folder, config, choice, mesh), metrics)
        for lane, mesh, choice in zip(lanes, meshes, choices, strict=True)
    ]
    heads = max(config.kv_heads // mesh.shape["kv"] for mesh in meshes)
    moved = move_sizes_of(config, heads, choices[0], meshes[0]) if move(lanes) else ()
    runners = [
        make_runner(settings, folder, config, choice, mesh, progress, moved)
        for mesh, choice in zip(meshes, choices, strict=True)
    ]
    courier = _courier(made, lanes, runners, progress) if moved else None
    for lane, runner, choice, log in zip(lanes, runners, choices, logs, strict=True):
        agent = Agent(
            lane.name, Scheduler(shape_of(settings, choice, config, eos_ids), root), max(moved, default=1)
        )
        device = runner if log is None else Recorded(runner, log)
        made.add_lane(Lane(agent, device, clock, metrics, courier), lane.role)
        if log is not None:
            made.on_stop.append(log.close)
    made.late_compiles = lambda: max(runner.compiles.late for runner in runners)
    for runner in runners:
        runner.compiles.seal()
    made.describe = describe(folder, config, lanes, choices[0], runners)
    made.block_bytes = block_bytes_of(config, config.kv_heads, choices[0])
    return made


def shape_of(settings: Settings, choice: Choice, config: ModelConfig, eos_ids: tuple[int, ...]) -> LaneShape:
    sizes = choice.sizes
    return LaneShape(
        sizes.num_blocks,
        sizes.block_size,
        sizes.max_rows,
        choice.max_tokens,
        sizes.max_length,
        config.vocab,
        eos_ids,
        settings.prefix_cache,
    )


def move_sizes_of(config: ModelConfig, heads: int, choice: Choice, mesh: Mesh) -> tuple[int, ...]:
    """How many blocks move at once, where `heads` kv heads are on one device."""
    keys_bytes = block_bytes_of(config, heads, choice) // 2
    return move_sizes(keys_bytes, choice.sizes.table_width, platform_of(mesh.devices.flat[0]))


def block_bytes_of(config: ModelConfig, heads: int, choice: Choice) -> int:
    """Bytes of the keys and values of `heads` kv heads, of all layers, in one block."""
    one = head_bytes(config.head_width, pool_dtype(choice.dtype, "any", choice.sizes.kv_dtype))
    return 2 * config.num_layers * heads * choice.sizes.block_size * one


def kv_kind(choice: Choice) -> str:
    """What the numbers in the blocks are."""
    kv_dtype = choice.sizes.kv_dtype
    return f"{choice.dtype} keys first" if kv_dtype is None else f"{choice.dtype} as {kv_dtype} keys first"


def _courier(
    made: Replica, lanes: Sequence[LaneSpec], runners: Sequence[Runner], progress: Progress
) -> LocalCourier:
    """What carries blocks between any two of the lanes, its programs compiled."""
    carriers: dict[tuple[str, str], Carrier] = {}
    pairs = [(a, b) for a in range(len(lanes)) for b in range(len(lanes)) if a != b]
    for done, (a, b) in enumerate(pairs):
        progress("compiling moves between lanes", done, len(pairs))
        source, target = runners[a], runners[b]
        axes = [(runner.model.mesh.shape["kv"], runner.model.mesh.shape["rep"]) for runner in (source, target)]
        plan = overlaps(source.model.config.kv_heads, *axes)
        carrier = carriers[lanes[a].name, lanes[b].name] = Carrier(source.model.mesh, target.model.mesh, plan)
        carrier.warm_up([source.gather([1] * size) for size in source.moves.sizes])
    verify = runners[0].model.mesh.devices.flat[0].platform == "cpu"
    courier = LocalCourier(carriers, made.pass_on, verify)
    made.on_stop.append(courier.stop)
    return courier


def make_runner(
    settings: Settings,
    folder: ModelFolder,
    config: ModelConfig,
    choice: Choice,
    mesh: Mesh,
    progress: Progress,
    moved: tuple[int, ...] = (),
    together: Callable[[str], None] | None = None,
) -> Runner:
    """The runner of one lane, its weights loaded and its programs compiled. Raises ModelError."""
    weights = load(
        folder,
        config,
        mesh,
        choice.dtype,
        allow_non_finite=settings.allow_non_finite,
        progress=lambda done, total: progress("loading weights", done, total),
    )
    model = Model(config, weights, mesh, choice.dtype, choice.numerics)
    most = COARSE if mesh.devices.flat[0].platform == "cpu" else FINE
    runner = Runner(model, choice.sizes, buckets(choice.sizes.max_rows, choice.max_tokens, most), moved)
    runner.warm_up(lambda what, done, total: progress(f"compiling {what}", done, total), together)
    return runner


def plan_header(
    lane: str, model: str, folder: ModelFolder, config: ModelConfig, choice: Choice, mesh: Mesh
) -> Header:
    """What a plan log of this lane says of it, and a replay compares."""
    sizes = choice.sizes
    return Header(
        lane=lane,
        model=model,
        revision=folder.revision,
        dtype=str(choice.dtype),
        kv_dtype=sizes.kv_dtype or "auto",
        numerics=choice.numerics,
        mesh=f"tp={mesh.size}",
        device=mesh.devices.flat[0].device_kind,
        num_blocks=sizes.num_blocks,
        block_size=sizes.block_size,
        max_rows=sizes.max_rows,
        max_length=sizes.max_length,
        max_tokens=choice.max_tokens,
        vocab=config.vocab,
        serac=_version("serac"),
        jax=_version("jax"),
        jaxlib=_version("jaxlib"),
    )


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""  # run from a folder, not installed


def open_plan_log(settings: Settings, header: Header, metrics: Metrics) -> PlanWriter | None:
    """The log of a lane's steps where the settings ask for one. Raises ConfigError."""
    if settings.plan_log is None:
        return None

    def told(cause: str) -> None:
        metrics.add("plan_logs_stopped", label=cause)

    return open_log(settings.plan_log, header, settings.plan_log_size, told)


def choose(
    settings: Settings, config: ModelConfig, stated: np.dtype
) -> tuple[tuple[LaneSpec, ...], tuple[Mesh, ...], tuple[Choice, ...]]:
    """Lanes with their meshes, and what the settings leave open for each, before anything is loaded.

    Raises ConfigError.
    """
    devices = _devices(settings.device)
    memory = (devices[0].memory_stats() or {}).get("bytes_limit") if devices[0].platform != "cpu" else None
    device = Device(target_of(devices[0]), memory, None)
    try:
        lanes = _lanes(settings, config, len(devices))
        check_devices(sum(lane.tp for lane in lanes), len(devices), ", ".join(map(str, lanes)))
        meshes, first = [], 0
        for lane in lanes:
            meshes += lane_meshes(MeshSpec(tp=lane.tp), config.heads, config.kv_heads, devices[first:])
            first += lane.tp
        choices = [decide(settings, config, MeshSpec(tp=lane.tp), device, stated) for lane in lanes]
    except ValueError as error:
        raise ConfigError(str(error), field="mesh") from error
    return lanes, tuple(meshes), tuple(choices)


def _lanes(settings: Settings, config: ModelConfig, visible: int) -> tuple[LaneSpec, ...]:
    if settings.lanes is not None:
        if settings.mesh != "auto":
            raise ConfigError("lanes: got --mesh as well; expected one of the two", field="lanes")
        return parse_lanes(settings.lanes)
    spec = _spec(settings.mesh, config, visible)
    check_devices(spec.size, visible, str(spec))
    return alike(spec.dp, spec.tp)


def _devices(wanted: str) -> list[jax.Device]:
    try:
        return jax.devices() if wanted == "auto" else jax.devices(wanted)
    except RuntimeError as error:
        raise ConfigError(
            f"device: got {wanted}; expected a device that is there ({error}); for GPUs: pip install 'serac[cuda]'",
            field="device",
        ) from error


def _spec(text: str, config: ModelConfig, visible: int) -> MeshSpec:
    if text != "auto":
        return parse_mesh(text)
    return MeshSpec(tp=max(size for size in valid_sizes(config.heads, config.kv_heads) if size <= visible))


def use_compile_cache(folder: Path | None) -> None:
    """Keep compiled programs in `folder`, private to the user; go on without, with a warning, where that fails."""
    chosen = folder or programs_folder(os.environ)
    try:
        chosen.mkdir(mode=0o700, parents=True, exist_ok=True)
        chosen.chmod(0o700)
        (chosen / ".writable").touch(mode=0o600)
    except OSError as error:
        if folder is not None:
            raise ConfigError(
                wrong("compile_cache", str(folder), f"a writable folder ({error.strerror})")
            ) from error
        logger.warning("compiled programs are not kept: %s: %s", chosen, error.strerror)
        return
    jax.config.update("jax_compilation_cache_dir", str(chosen))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def describe(
    folder: ModelFolder, config: ModelConfig, lanes: Sequence[LaneSpec], choice: Choice, runners: list[Runner]
) -> dict[str, object]:
    """What will run where and how memory is spent, for the banner and GetServerInfo; bytes are of one device."""
    runner = runners[0]
    first = runner.model.mesh.devices.flat[0]
    return {
        "model": folder.name,
        "revision": folder.short_revision,
        "architecture": config.architecture,
        "device": first.device_kind,
        "platform": first.platform,
        "devices": sum(lane.tp for lane in lanes),
        "lanes": spoken(lanes),
        "lane_axes": dict(runner.model.mesh.shape),
        "dtype": str(choice.dtype),
        "kv_dtype": choice.sizes.kv_dtype or str(choice.dtype),
        "numerics": choice.numerics,
        "context": choice.sizes.max_length,
        "block_size": choice.sizes.block_size,
        "num_blocks": choice.sizes.num_blocks,
        "max_num_seqs": choice.sizes.max_rows,
        "max_num_batched_tokens": choice.max_tokens,
        "programs": len(runner.programs),
        "buckets": [str(bucket) for bucket in runner.buckets],
        "weights_bytes": _device_bytes(runner.model.weights),
        "kv_bytes": _device_bytes((runner.state.k, runner.state.v)),
        "state_bytes": _device_bytes((runner.state.history_RS, runner.state.table_RM, runner.draws)),
        "temporary_bytes": max((p.temp_bytes or 0) for p in runner.programs.values()),
        "compile_seconds": round(sum(p.compile_s for r in runners for p in r.programs.values()), 2),
    }


def _device_bytes(arrays: object) -> int:
    """Bytes of a tree of arrays on one device."""
    return sum(int(array.addressable_shards[0].data.nbytes) for array in jax.tree.leaves(arrays))
