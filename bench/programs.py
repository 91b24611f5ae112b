"""What a compiled program sends, read from its text: the actual beside sharding/estimate.py's count.

    %all-reduce.3 = f32[64,256]{1,0} all-reduce(...)      -> all-reduce, 1 call, 65,536 bytes

The bytes are those of the result on one device. An asynchronous collective is counted where it starts; its result
holds operand and result side by side, of which the last is the result. (Some compilers write the start of an
all-reduce with its result alone, some as `((operand), result)`.)
"""

import functools
import re
from collections.abc import Callable, Iterable
from math import prod

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.stages import Compiled, Lowered

from engine.models.config import ModelConfig
from engine.planning import Choice
from engine.runner.buckets import Bucket
from engine.runner.draws import FIELDS, Draws
from engine.runner.state import POOL, State, pool_dtype, pools
from engine.runner.step import step_program
from engine.weights.layout import parameters
from sharding.estimate import Collective
from sharding.mesh import MeshSpec, lane_meshes
from sharding.rules import TENSOR, place

KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
CALL = re.compile(rf"= (\(.*?\)|\S+) ({KINDS})(-start)?\(")
ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
BITS = {"pred": 8, "bf16": 16, "c64": 64}


def collectives(text: str) -> tuple[Collective, ...]:
    """Kind, calls and bytes of all collectives in the text of a compiled program, most calls first."""
    found: dict[str, list[int]] = {}
    for result, kind, start in CALL.findall(text):
        arrays = [array_bytes(*array) for array in ARRAY.findall(result)]
        if start and (kind != "all-reduce" or result.startswith("((")):
            arrays = arrays[len(arrays) // 2 :]
        found.setdefault(kind, []).append(sum(arrays))
    each = [Collective(kind, len(sizes), sum(sizes)) for kind, sizes in found.items()]
    return tuple(sorted(each, key=lambda one: -one.calls))


def array_bytes(dtype: str, sizes: str) -> int:
    """Bytes of `f32[64,256]`."""
    bits = BITS.get(dtype) or int(re.sub(r"\D.*", "", dtype.lstrip("fsu")))
    return prod(int(size) for size in sizes.split(",") if size) * bits // 8


def compiled(config: ModelConfig, spec: MeshSpec, choice: Choice, bucket: Bucket) -> Compiled:
    """The program of one bucket, compiled for arrays that nobody makes; the devices of `spec` must be visible."""
    return lowered(config, lane_meshes(spec, config.heads, config.kv_heads)[0], choice, bucket).compile()


def lowered(config: ModelConfig, mesh: Mesh, choice: Choice, bucket: Bucket) -> Lowered:
    """The program of one bucket for a lane's mesh, whose devices may be those of a topology that is not at hand."""
    sizes = choice.sizes
    weights: dict = {"layers": tuple({} for _ in range(config.num_layers))}
    for parameter in parameters(config, mesh.size):
        *outer, name = parameter.path
        sharding = place(parameter.letters, parameter.shape, TENSOR, mesh)
        home = weights["layers"][outer[1]] if outer else weights
        home[name] = jax.ShapeDtypeStruct(parameter.shape, choice.dtype, sharding=sharding)
    held = pool_dtype(choice.dtype, mesh.devices.flat[0].platform, sizes.kv_dtype)
    pool = (config.num_layers * sizes.num_blocks, config.kv_heads, sizes.block_size, config.head_width)

    def at(where: PartitionSpec) -> Callable[..., jax.ShapeDtypeStruct]:
        return functools.partial(jax.ShapeDtypeStruct, sharding=NamedSharding(mesh, where))

    lines = [(sizes.max_rows, sizes.max_length), (sizes.max_rows, sizes.table_width)]
    state = State(*pools(pool, held, at(POOL)), *(at(PartitionSpec())(line, np.int32) for line in lines))
    whole = NamedSharding(mesh, PartitionSpec())
    draws = Draws(
        **{
            name: jax.ShapeDtypeStruct((sizes.max_rows, *([width] if width > 1 else [])), dtype, sharding=whole)
            for name, dtype, width in FIELDS
        }
    )
    specs = jax.tree.map(lambda w: w.sharding.spec, weights)
    build = step_program(config, sizes, mesh, specs, choice.numerics)
    return build(bucket).lower(weights, state, draws, jax.ShapeDtypeStruct((bucket.rows, 6), np.int32))


def by_kind(each: Iterable[Collective]) -> dict[str, tuple[int, int]]:
    """kind -> (calls, bytes)."""
    return {one.kind: (one.calls, one.result_bytes) for one in each}
