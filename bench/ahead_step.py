"""A whole step of a model that is split over eight GPUs, none of which is there.

    "step decode 64 tp=8" -> the lane's program (bench/programs.py) on a topology of eight -> facts of its text

The model is Llama-3-70B cut to two layers: layers are unrolled and alike, so that two show what eighty do. What is
counted in the text of the compiled program: collectives beside sharding/estimate.py, arrays as large as a layer's
cache that are copied or transposed, calls of kernels. The executable is written out and measured; it is never read
back here, since that would need a GPU.

Ahead of time nothing is tuned, so which library multiplies is fixed by an option and both are compiled. Collectives
join the command buffers only when asked to: then the whole step is one call of the host.
Cost: 4 to 8 s a step.
"""

import re
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.stages import Compiled, Lowered

from bench.programs import ARRAY, array_bytes, by_kind, collectives, lowered
from engine.models.config import ModelConfig, Rope
from engine.planning import DEVICES, Choice, estimate
from engine.runner.buckets import Bucket
from engine.runner.state import Sizes
from sharding.mesh import MeshSpec, lane_meshes

NAME = "step "
TP = 8
LAYERS = 2
MODEL = ModelConfig(
    architecture="LlamaForCausalLM",
    num_layers=LAYERS,
    width=8192,
    ffn=28672,
    heads=64,
    kv_heads=8,
    head_width=128,
    vocab=128256,
    context=8192,
    norm_eps=1e-5,
    rope=Rope("llama3", 500000.0, factor=8.0, original_context=8192, low=1.0, high=4.0),
    qk_norm=False,
    qkv_bias=False,
    o_bias=False,
    mlp_bias=False,
    tied=False,
    windows=(None,) * LAYERS,
)
CHOICE = Choice(np.dtype(jnp.bfloat16), Sizes(8192, 64, 64, 8192), 2048, "fast")
GPU = DEVICES["h200"]
DECODE, MIXED = Bucket(64, 64, True, False), Bucket(2048, 64, False, False)
MOVED = re.compile(r"= (\(.*?\)|\S+) (copy|transpose|copy-start)\(")


class Step(NamedTuple):
    """One program: its padded shape, options of XLA other than its own, over how many hosts its devices are."""

    bucket: Bucket
    odd: str = ""
    hosts: int = 1

    @property
    def name(self) -> str:
        """As it stands in tables."""
        kind = "decode" if self.bucket.one_token else "mixed"
        spread = f" {self.hosts} hosts" * (self.hosts > 1)
        return f"{NAME}{kind} {self.bucket.tokens} tp={TP}{spread} {self.odd}".strip()

    @property
    def options(self) -> dict[str, bool | str]:
        """For the compiler."""
        return OPTIONS[self.odd]


OPTIONS = {
    "": {"xla_gpu_enable_triton_gemm": True},
    "cublas": {"xla_gpu_enable_triton_gemm": False},
    "one graph": {
        "xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,COLLECTIVES,CONDITIONAL"
    },
}
STEPS = (*(Step(bucket, odd) for bucket in (DECODE, MIXED) for odd in OPTIONS), Step(DECODE, hosts=2))


def named(name: str) -> Step:
    """The step of that name."""
    return {step.name: step for step in STEPS}[name]


def step_lowered(step: Step, devices: list[jax.Device]) -> Lowered:
    """The lane's program on a mesh of `devices`."""
    mesh = lane_meshes(MeshSpec(tp=TP), MODEL.heads, MODEL.kv_heads, devices)[0]
    return lowered(MODEL, mesh, CHOICE, step.bucket)


def facts(step: Step, compiled: Compiled) -> dict[str, object]:
    """What the text of the program shows, beside what was planned."""
    text = compiled.as_text()
    plan = estimate(MODEL, MeshSpec(tp=TP), GPU, CHOICE)
    sent = next(line.collectives for line in plan.steps if line.bucket == step.bucket)
    began = time.perf_counter()
    size = len(compiled.runtime_executable().serialize())
    return {
        "collectives": by_kind(collectives(text)),
        "planned_collectives": by_kind(sent),
        "pool_bytes": plan.kv_bytes,
        "planned_temp_bytes": plan.temporary_bytes,
        "moved": moved(text, plan.kv_bytes // (2 * LAYERS)),
        "executable_bytes": size,
        "serialise_s": round(time.perf_counter() - began, 3),
    }


def moved(text: str, least_bytes: int) -> list[str]:
    """Copies and transposes in the text of a program, fused or not, whose result has that many bytes."""
    return [
        f"{kind} {result}"
        for result, kind in MOVED.findall(text)
        if max((array_bytes(*array) for array in ARRAY.findall(result)), default=0) >= least_bytes
    ]
