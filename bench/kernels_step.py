"""A whole decode step, because a kernel is judged by it: with our kernels or without, in command buffers or not.

    Llama-3-8B cut to four layers, random weights, bfloat16, blocks of 64, every row at position 1,023
    time        slope between few and many steps, each given to the device while the one before still runs
    launches    what the compiled program starts, and how many command buffers hold it (bench/ahead_compile.py)

Command buffers are an option of the compiler, so each way has a process of its own. Cost: half a minute each.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np

from bench.ahead_compile import in_buffers, is_launch
from bench.decode import prepared
from bench.kernels_process import Row
from bench.kernels_time import slope
from engine.models.config import ModelConfig, Rope
from engine.weights.drawn import random_weights
from pallas_kernels.dispatch import KERNELS
from sharding.mesh import MeshSpec, lane_meshes

BATCHES = (1, 64, 256)
WAYS = {"command buffers": "", "single launches": "--xla_gpu_enable_command_buffer="}
POSITIONS, BLOCK = 1024, 64
COUNTS = (2, 18)
LAYERS = 4


def flags(way: str, folder: Path) -> str:
    """XLA_FLAGS of a process."""
    return f"{WAYS[way]} --xla_dump_to={folder} --xla_dump_hlo_pass_re=NONE".strip()


def config_of(small: bool) -> ModelConfig:
    """The model's shape."""
    sizes = {"width": 64, "ffn": 128, "heads": 4, "kv_heads": 2, "head_width": 16, "vocab": 256, "context": 2048}
    if not small:
        sizes = {
            "width": 4096,
            "ffn": 14336,
            "heads": 32,
            "kv_heads": 8,
            "head_width": 128,
            "vocab": 128256,
            "context": 8192,
        }
    layers = 1 if small else LAYERS
    return ModelConfig(
        architecture="LlamaForCausalLM",
        num_layers=layers,
        norm_eps=1e-5,
        rope=Rope("llama3", 500000.0, factor=8.0, original_context=8192, low=1.0, high=4.0),
        qk_norm=False,
        qkv_bias=False,
        o_bias=False,
        mlp_bias=False,
        tied=False,
        windows=(None,) * layers,
        **sizes,
    )


def measure(batch: int, by: str, small: bool, dump: Path) -> Row:
    """Figures of the step with `kernels` or with `xla` alone; `dump` is where XLA writes what it compiles."""
    config = config_of(small)
    mesh = lane_meshes(MeshSpec(), config.heads, config.kv_heads, jax.devices()[:1])[0]
    dtype = np.dtype(jnp.bfloat16)
    weights = random_weights(config, mesh, dtype)
    batch, positions = (min(batch, 2), 40) if small else (batch, POSITIONS)
    without = {part: () for part in KERNELS} if by == "xla" else {}
    with patch.dict(KERNELS, without):  # who serves is chosen while tracing
        runner, packed = prepared(config, weights, mesh, batch, positions, dtype, BLOCK)
    took = slope(steps(runner, weights, packed), COUNTS)
    program = runner.programs[runner.buckets[0]]
    return {
        "batch": batch,
        "layers": config.num_layers,
        "us": 1e6 * took,
        "kernel calls": program.text().count("mosaic_gpu") + program.text().count("__gpu$xla.gpu.triton"),
        "temp_bytes": program.temp_bytes,
        **launches(dump),
    }


def steps(runner, weights: Mapping, packed: np.ndarray) -> Callable[[int], None]:
    """A function that gives so many steps to the device and waits for the last."""
    program = runner.programs[runner.buckets[0]]

    def run(count: int) -> None:
        for _ in range(count):
            runner.state, result = program.run(weights, runner.state, runner.draws, packed)
        np.asarray(result)

    return run


def launches(dump: Path) -> dict[str, int | None]:
    """Of the program with most of them, which is the step; None where the compiler wrote nothing of it."""
    found = {"launches": None, "command buffers": None, "launches in them": None}
    for file in dump.glob("*.thunk_sequence.txt"):
        count = sum(map(is_launch, file.read_text().splitlines()))
        if count > (found["launches"] or 0):
            after = file.with_name(file.name.replace("thunk_sequence", "thunk_sequence_after_thunk_passes"))
            passed = after.read_text().splitlines() if after.exists() else []
            found = {
                "launches": count,
                "command buffers": sum("kCommandBuffer" in line for line in passed),
                "launches in them": sum(map(is_launch, in_buffers(passed))),
            }
    return found
