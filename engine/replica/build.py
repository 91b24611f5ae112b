"""From settings to a running replica: the only place that knows every class.

    resolve model -> config, tokenizer -> meshes -> for each lane: weights, pool, programs compiled -> replica

Everything that can be refused is refused before weights are read, and weights before programs are compiled.
"""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh
from prometheus_client import CollectorRegistry

from engine.clock import Clock, SystemClock
from engine.config import Settings
from engine.core import prefix
from engine.core.request import Limits
from engine.core.scheduler import LaneShape, Scheduler
from engine.errors import ConfigError, ModelError, wrong
from engine.models.config import ModelConfig, from_hf
from engine.observe.metrics import Metrics
from engine.replica.lane import Lane
from engine.replica.replica import ModelInfo, Replica
from engine.runner.buckets import COARSE, FINE, buckets
from engine.runner.runner import Model, Runner
from engine.runner.state import Sizes, pool_dtype
from engine.text.text import Text
from engine.weights.load import load
from engine.weights.source import ModelFolder, resolve
from sharding.mesh import MeshSpec, lane_meshes, parse_mesh, valid_sizes

logger = logging.getLogger("serac.build")

Progress = Callable[[str, int, int], None]  # (what, done, of)

CPU_BLOCK, GPU_BLOCK = 16, 64
CPU_KV_BYTES = 1 << 30  # a device
GPU_SHARE = 0.85  # of a device's memory for weights and KV; the rest is for temporaries and the runtime


@dataclass(frozen=True, slots=True)
class Choices:
    """What the settings left open, decided for this model on these devices."""

    spec: MeshSpec
    meshes: tuple[Mesh, ...]
    dtype: np.dtype
    sizes: Sizes
    max_tokens: int
    kv_bytes: int  # of one device


def replica(settings: Settings, progress: Progress = lambda *_: None, clock: Clock | None = None) -> Replica:
    """A replica that is ready to start. Raises ConfigError or ModelError, naming what to change."""
    folder = resolve(settings.model)
    config = from_hf(folder.config())
    text = Text(folder.path)
    if text.vocab > config.vocab:
        raise ModelError(f"tokenizer.json: {text.vocab} token ids; expected at most vocab_size {config.vocab}")
    choices = choose(settings, config)
    use_compile_cache(settings.compile_cache)
    name = settings.served_model_name or folder.name
    eos_ids = tuple(text.eos_ids)
    info = ModelInfo(name, folder.short_revision, choices.sizes.max_length, config.vocab, eos_ids, text.defaults)
    sizes = choices.sizes
    limits = Limits(
        config.vocab, sizes.max_length, (sizes.num_blocks - 1) * sizes.block_size, sizes.block_size, eos_ids
    )
    made = Replica(
        info, text, limits, clock or SystemClock(), Metrics(CollectorRegistry()), max_open=settings.max_calls
    )
    runners = [_runner(settings, folder, config, choices, mesh, progress) for mesh in choices.meshes]
    root = prefix.root(folder.revision, settings.numerics, str(choices.dtype), "k_PKCH", str(sizes.block_size))
    for index, runner in enumerate(runners):
        shape = LaneShape(
            sizes.num_blocks,
            sizes.block_size,
            sizes.max_rows,
            choices.max_tokens,
            sizes.max_length,
            config.vocab,
            eos_ids,
            settings.prefix_cache,
        )
        scheduler = Scheduler(shape, root)
        made.add_lane(
            lambda sink, i=index, s=scheduler, r=runner: Lane(str(i), s, r, made.clock, made.metrics, sink)
        )
    made.late_compiles = lambda: max(runner.compiles.late for runner in runners)
    for runner in runners:
        runner.compiles.seal()
    made.describe = describe(settings, folder, config, choices, runners)
    return made


def _runner(
    settings: Settings, folder: ModelFolder, config: ModelConfig, choices: Choices, mesh: Mesh, progress: Progress
) -> Runner:
    weights = load(
        folder,
        config,
        mesh,
        choices.dtype,
        allow_non_finite=settings.allow_non_finite,
        progress=lambda done, total: progress("loading weights", done, total),
    )
    model = Model(config, weights, mesh, choices.dtype, settings.numerics)
    most = COARSE if mesh.devices.flat[0].platform == "cpu" else FINE
    runner = Runner(model, choices.sizes, buckets(choices.sizes.max_rows, choices.max_tokens, most))
    runner.warm_up(lambda what, done, total: progress(f"compiling {what}", done, total))
    return runner


def choose(settings: Settings, config: ModelConfig) -> Choices:
    """Everything the settings leave open, before anything is loaded. Raises ConfigError."""
    devices = _devices(settings.device)
    platform = devices[0].platform
    try:
        spec = _spec(settings.mesh, config, len(devices))
        meshes = lane_meshes(spec, config.heads, config.kv_heads, devices)
    except ValueError as error:
        raise ConfigError(str(error), field="mesh") from error
    if settings.numerics == "invariant" and spec.tp not in (1, 2, 4, 8):
        raise ConfigError(
            wrong("mesh", f"tp={spec.tp}", "tp of 1, 2, 4 or 8 with --numerics invariant"), field="mesh"
        )
    dtype = _dtype(settings.dtype, platform)
    context = settings.max_model_len or min(config.context, 8192 if platform != "cpu" else 2048)
    if context > config.context:
        raise ConfigError(wrong("max_model_len", context, f"at most the model's context {config.context}"))
    block_size = settings.block_size or (CPU_BLOCK if platform == "cpu" else GPU_BLOCK)
    rows, tokens = settings.max_num_seqs, settings.max_num_batched_tokens
    if tokens < rows:
        raise ConfigError(
            wrong(
                "max_num_batched_tokens", tokens, f"at least max_num_seqs {rows}, so that every sequence can step"
            )
        )
    kv_bytes = settings.kv_memory or _kv_bytes(devices[0], config, spec, dtype)
    sizes = Sizes(
        _blocks(config, spec, dtype, platform, block_size, context, rows, kv_bytes), block_size, rows, context
    )
    return Choices(spec, meshes, dtype, sizes, tokens, kv_bytes)


def block_bytes(config: ModelConfig, kv_ways: int, itemsize: int, block_size: int) -> int:
    """Bytes that one block takes on one device: keys and values of all layers."""
    return 2 * config.num_layers * (config.kv_heads // kv_ways) * block_size * config.head_width * itemsize


def _blocks(config, spec, dtype, platform, block_size, context, rows, kv_bytes) -> int:
    """Blocks of a pool that fits `kv_bytes` a device, and no more than all rows can ever fill."""
    per_block = block_bytes(config, min(config.kv_heads, spec.tp), pool_dtype(dtype, platform).itemsize, block_size)
    one_sequence = -(-context // block_size)
    blocks = min(kv_bytes // per_block, rows * one_sequence + 1)
    if blocks < one_sequence + 1:
        raise ConfigError(
            f"kv_memory: got {kv_bytes} bytes, room for {blocks} blocks; expected {one_sequence + 1} blocks = "
            f"{(one_sequence + 1) * per_block} bytes, one sequence of {context} tokens; lower --max-model-len or "
            "raise --kv-memory",
            field="kv_memory",
        )
    return int(blocks)


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


def _dtype(wanted: str, platform: str) -> np.dtype:
    if wanted == "auto":
        wanted = "float32" if platform == "cpu" else "bfloat16"
    return np.dtype(jax.numpy.dtype(wanted))


def _kv_bytes(device: jax.Device, config: ModelConfig, spec: MeshSpec, dtype: np.dtype) -> int:
    stats = device.memory_stats() or {}
    if device.platform == "cpu" or "bytes_limit" not in stats:
        return CPU_KV_BYTES
    per_layer = config.width * (config.heads + 2 * config.kv_heads) * config.head_width
    per_layer += config.width * (config.heads * config.head_width + 3 * config.ffn)
    weights = (config.num_layers * per_layer + 2 * config.vocab * config.width) * dtype.itemsize // spec.tp
    return max(int(stats["bytes_limit"] * GPU_SHARE) - weights, 1)


def use_compile_cache(folder: Path | None) -> None:
    """Keep compiled programs in `folder`, private to the user; go on without, with a warning, where that fails."""
    chosen = folder or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "serac" / "programs"
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
    settings: Settings, folder: ModelFolder, config: ModelConfig, choices: Choices, runners: list[Runner]
) -> dict[str, object]:
    """What will run where and how memory is spent, for the banner and GetServerInfo; bytes are of one device."""
    first = choices.meshes[0].devices.flat[0]
    weights = sum(w.addressable_shards[0].data.nbytes for w in jax.tree.leaves(runners[0].model.weights))
    state = runners[0].state
    return {
        "model": folder.name,
        "revision": folder.short_revision,
        "architecture": config.architecture,
        "device": first.device_kind,
        "platform": first.platform,
        "devices": choices.spec.size,
        "mesh": str(choices.spec),
        "lane_axes": dict(choices.meshes[0].shape),
        "dtype": str(choices.dtype),
        "numerics": settings.numerics,
        "context": choices.sizes.max_length,
        "block_size": choices.sizes.block_size,
        "num_blocks": choices.sizes.num_blocks,
        "max_num_seqs": choices.sizes.max_rows,
        "max_num_batched_tokens": choices.max_tokens,
        "programs": len(runners[0].programs),
        "buckets": [str(bucket) for bucket in runners[0].buckets],
        "weights_bytes": int(weights),
        "kv_bytes": int(sum(pool.addressable_shards[0].data.nbytes for pool in (state.k_PKCH, state.v_PKCH))),
        "temporary_bytes": max((p.temp_bytes or 0) for p in runners[0].programs.values()),
        "compile_seconds": round(sum(p.compile_s for r in runners for p in r.programs.values()), 2),
    }
