"""What serving a model on a mesh takes, computed without a device: sizes, bytes, collectives, programs.

    ModelConfig + Settings + what a device holds --decide--> Choice --estimate--> Plan, shown by plan_report.py

Weights are counted from engine/weights/layout.py, state from engine/runner/state.py, programs from
engine/runner/buckets.py, each by the rule that makes them, so these figures equal what a server then holds. The
temporaries are an estimate: sharding/estimate.py says where it holds. Bytes are those of one device.
Cost: milliseconds.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from engine.config import Settings, suggestion
from engine.errors import ConfigError, wrong
from engine.models.config import ModelConfig
from engine.runner.buckets import COARSE, FINE, Bucket, buckets
from engine.runner.draws import WIDTH
from engine.runner.state import Sizes, head_bytes, load_lengths, pool_dtype
from engine.weights.layout import padded, parameters
from pallas_kernels.dispatch import CPU, Shape, Target, choose, parts
from pallas_kernels.dispatch import Choice as Attention
from sharding.estimate import (
    Collective,
    Decoder,
    Lane,
    block_bytes,
    peak_temporaries,
    pool_blocks,
    step_collectives,
)
from sharding.mesh import MeshSpec, lane_axes

WORD, MIB = 4, 1 << 20
BFLOAT16 = np.dtype(jnp.bfloat16)
KV_DTYPES = {"auto": None, "int8": "int8", "fp8": "float8_e4m3fn"}
CPU_BLOCK, GPU_BLOCK = 16, 64  # positions
CPU_CONTEXT, GPU_CONTEXT = 2048, 8192  # unless the model's is shorter or a longer one is asked for
CPU_ROWS, GPU_ROWS = 8, 256
CPU_TOKENS, GPU_TOKENS = 128, 2048  # of a step
CPU_KV_BYTES = 1 << 30
GPU_SHARE = 0.85  # of a device's memory for weights and KV; the rest is for temporaries and the runtime


class Device(NamedTuple):
    """Memory as the driver reports it, bandwidth as the data sheet does."""

    target: Target
    memory_bytes: int | None
    bytes_per_s: float | None

    @property
    def platform(self) -> str:
        return self.target.platform


DEVICES = {
    "cpu": Device(CPU, None, None),
    "h200": Device(Target("cuda", 90, 132, "NVIDIA H200"), 143771 * MIB, 4.8e12),
    "h100": Device(Target("cuda", 90, 132, "NVIDIA H100 80GB HBM3"), 81559 * MIB, 3.35e12),
    "h20": Device(Target("cuda", 90, 78, "NVIDIA H20"), 97871 * MIB, 4.0e12),
    "a100-80": Device(Target("cuda", 80, 108, "NVIDIA A100-SXM4-80GB"), 81920 * MIB, 2.04e12),
    "a100-40": Device(Target("cuda", 80, 108, "NVIDIA A100-SXM4-40GB"), 40960 * MIB, 1.56e12),
    "b200": Device(Target("cuda", 100, 148, "NVIDIA B200"), 183359 * MIB, 8.0e12),
    "l40s": Device(Target("cuda", 89, 142, "NVIDIA L40S"), 46068 * MIB, 0.864e12),
    "l4": Device(Target("cuda", 89, 58, "NVIDIA L4"), 23034 * MIB, 0.3e12),
    "a10g": Device(Target("cuda", 86, 80, "NVIDIA A10G"), 23028 * MIB, 0.6e12),
    "rtx4090": Device(Target("cuda", 89, 128, "NVIDIA GeForce RTX 4090"), 24564 * MIB, 1.008e12),
}


class Choice(NamedTuple):
    """What the settings left open, decided."""

    dtype: np.dtype
    sizes: Sizes
    max_tokens: int
    numerics: str


@dataclass(frozen=True, slots=True)
class Step:
    """One program of the lane."""

    bucket: Bucket
    attention: tuple[Attention, ...]  # one for each part
    collectives: tuple[Collective, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """The figures of one lane; all lanes are alike."""

    spec: MeshSpec
    kv_ways: int
    kv_copies: int  # devices that hold the same kv head
    device: Device
    choice: Choice
    checkpoint_bytes: int  # of the whole model in this dtype, nothing padded or repeated
    weights_bytes: int
    padding: Mapping[str, int]  # bytes of a device's weights that hold zeros or copies
    block_bytes: int
    kv_bytes: int
    state_bytes: int
    temporary_bytes: int  # of the largest program, about; programs run one after the other
    steps: tuple[Step, ...]
    loads: int  # programs that load rows

    @property
    def total_bytes(self) -> int:
        """All that a device holds while the largest program runs."""
        return self.weights_bytes + self.kv_bytes + self.state_bytes + self.temporary_bytes

    @property
    def fits(self) -> bool:
        """All of it is in the device's memory, as far as that is known."""
        return self.device.memory_bytes is None or self.total_bytes <= self.device.memory_bytes

    @property
    def read_s(self) -> float | None:
        """Seconds to read a device's weights once, at the bandwidth of its data sheet."""
        return None if self.device.bytes_per_s is None else self.weights_bytes / self.device.bytes_per_s

    @property
    def tokens(self) -> int:
        """Positions that the pool holds; block 0 is the sink."""
        return (self.choice.sizes.num_blocks - 1) * self.choice.sizes.block_size

    @property
    def whole_sequences(self) -> int:
        """Sequences of full length that run at once."""
        sizes = self.choice.sizes
        return min((sizes.num_blocks - 1) // sizes.table_width, sizes.max_rows)


def device_named(name: str) -> Device:
    """A row of DEVICES. Raises ConfigError."""
    if name not in DEVICES:
        expected = "one of " + ", ".join(DEVICES)
        raise ConfigError(wrong("device", name, expected) + suggestion(name, DEVICES), field="device")
    return DEVICES[name]


def weights_bytes(config: ModelConfig, tp: int, itemsize: int) -> int:
    """Bytes of weights on one device."""
    return sum(prod(parameter.local_shape) for parameter in parameters(config, tp)) * itemsize


def state_bytes(sizes: Sizes) -> int:
    """Bytes of history, block tables and sampling records; every device holds them all."""
    return sizes.max_rows * (sizes.max_length + sizes.table_width + WIDTH) * WORD


def decide(
    settings: Settings, config: ModelConfig, spec: MeshSpec, device: Device, stated: np.dtype = BFLOAT16
) -> Choice:
    """What the settings leave open.

    stated  the dtype that the model's config.json names (`engine.weights.tensors.choose_dtype`); on CPU, where
            bfloat16 may be slow, auto is float32
    Raises ConfigError, naming the setting, and ShardingError for heads that do not split.
    """
    kv_ways, _ = lane_axes(spec.tp, config.heads, config.kv_heads)
    if settings.numerics == "invariant" and spec.tp not in (1, 2, 4, 8):
        expected = "tp of 1, 2, 4 or 8 with --numerics invariant"
        raise ConfigError(wrong("mesh", f"tp={spec.tp}", expected), field="mesh")
    on_cpu = device.platform == "cpu"
    automatic = np.dtype(np.float32) if on_cpu else stated
    dtype = automatic if settings.dtype == "auto" else np.dtype(jnp.dtype(settings.dtype))
    context = settings.max_model_len or min(config.context, CPU_CONTEXT if on_cpu else GPU_CONTEXT)
    if context > config.context:
        raise ConfigError(
            wrong("max_model_len", context, f"at most the model's context {config.context}"), field="max_model_len"
        )
    rows = settings.max_num_seqs or (CPU_ROWS if on_cpu else GPU_ROWS)
    tokens = settings.max_num_batched_tokens or max(CPU_TOKENS if on_cpu else GPU_TOKENS, rows)
    if tokens < rows:
        expected = f"at least max_num_seqs {rows}, so that every sequence can step"
        raise ConfigError(wrong("max_num_batched_tokens", tokens, expected), field="max_num_batched_tokens")
    block_size = settings.block_size or (CPU_BLOCK if on_cpu else GPU_BLOCK)
    kv_dtype = KV_DTYPES[settings.kv_dtype]
    lane = _lane(config, kv_ways, spec, dtype, device, settings.numerics, kv_dtype)
    one_block = block_bytes(_decoder(config, spec.tp), lane, block_size)
    memory = settings.kv_memory or _kv_budget(config, spec, dtype, device)
    try:
        blocks = pool_blocks(memory, one_block, -(-context // block_size), rows)
    except ValueError as error:
        raise ConfigError(
            f"kv_memory: {error}: one sequence of {context} tokens; lower --max-model-len or raise --kv-memory",
            field="kv_memory",
        ) from error
    return Choice(dtype, Sizes(blocks, block_size, rows, context, kv_dtype), tokens, settings.numerics)


def estimate(config: ModelConfig, spec: MeshSpec, device: Device, choice: Choice) -> Plan:
    """The figures of a lane. Raises ShardingError when the heads do not split."""
    kv_ways, rep = lane_axes(spec.tp, config.heads, config.kv_heads)
    sizes, itemsize = choice.sizes, choice.dtype.itemsize
    decoder = _decoder(config, spec.tp)
    lane = _lane(config, kv_ways, spec, choice.dtype, device, choice.numerics, sizes.kv_dtype)
    one_block = block_bytes(decoder, lane, sizes.block_size)
    programs = buckets(sizes.max_rows, choice.max_tokens, COARSE if device.platform == "cpu" else FINE)
    return Plan(
        spec=spec,
        kv_ways=kv_ways,
        kv_copies=rep,
        device=device,
        choice=choice,
        checkpoint_bytes=sum(prod(part.shape) for row in parameters(config, 1) for part in row.parts) * itemsize,
        weights_bytes=weights_bytes(config, spec.tp, itemsize),
        padding=_padding(config, spec.tp, itemsize),
        block_bytes=one_block,
        kv_bytes=sizes.num_blocks * one_block,
        state_bytes=state_bytes(sizes),
        temporary_bytes=peak_temporaries(decoder, lane, choice.max_tokens, sizes.max_rows),
        steps=tuple(_step(decoder, lane, choice, device, bucket) for bucket in programs),
        loads=len(load_lengths(sizes.max_length)),
    )


def _step(decoder: Decoder, lane: Lane, choice: Choice, device: Device, bucket: Bucket) -> Step:
    held = pool_dtype(choice.dtype, device.platform, choice.sizes.kv_dtype)
    kv_heads, block = decoder.kv_heads // lane.kv_ways, choice.sizes.block_size
    pool_size = decoder.num_layers * choice.sizes.num_blocks * kv_heads * block * decoder.head_width
    group = decoder.heads // lane.tp // kv_heads
    shape = Shape(group, decoder.head_width, block, choice.dtype.name, held.name, pool_size)
    serve = tuple(choose(part, device.target, shape) for part in parts(choice.numerics, bucket.one_token))
    return Step(bucket, serve, step_collectives(decoder, lane, bucket.tokens, bucket.rows, bucket.full))


def _decoder(config: ModelConfig, tp: int) -> Decoder:
    ffn, vocab = padded(config.ffn, tp), padded(config.vocab, tp)
    return Decoder(config.num_layers, config.width, ffn, config.heads, config.kv_heads, config.head_width, vocab)


def _lane(
    config: ModelConfig,
    kv_ways: int,
    spec: MeshSpec,
    dtype: np.dtype,
    device: Device,
    numerics: str,
    kv_dtype: str | None,
) -> Lane:
    held = pool_dtype(dtype, device.platform, kv_dtype)
    return Lane(spec.tp, kv_ways, dtype.itemsize, head_bytes(config.head_width, held), numerics == "invariant")


def _kv_budget(config: ModelConfig, spec: MeshSpec, dtype: np.dtype, device: Device) -> int:
    """Bytes for the pool when the settings name none."""
    if device.memory_bytes is None:
        return CPU_KV_BYTES
    return max(int(device.memory_bytes * GPU_SHARE) - weights_bytes(config, spec.tp, dtype.itemsize), 1)


def _padding(config: ModelConfig, tp: int, itemsize: int) -> dict[str, int]:
    """By cause, the bytes of one device's weights that a model split evenly over tp devices would not have.

    ffn, vocab   zeros, on average over the devices
    kv heads     copies of key and value projections on devices that share a kv head
    norms        vectors of which every device holds all
    """
    counts = {"ffn": 0.0, "vocab": 0.0, "kv heads": 0.0, "norms": 0.0}
    for parameter in parameters(config, tp):
        for part in parameter.parts:
            whole = prod(part.shape)
            if part.axis is None:
                counts["norms"] += whole - whole / tp
                continue
            held = whole // part.shape[part.axis] * part.step
            cause = "vocab" if parameter.letters.count("V") else "kv heads" if part.repeat > 1 else "ffn"
            counts[cause] += held - whole / tp
    return {cause: round(count * itemsize) for cause, count in counts.items()}
