"""The decode step on a CPU beside the time it takes to read the weights once.

    read the weights' bytes | steps | read | steps | ... -> ratio of each run of steps to the readings around it

Every row decodes at the same position over scattered blocks; weights and tokens are random, the draw is greedy.
The step is the compiled program alone, called again and again: no scheduler. A ratio of 1 is the floor: no step can
be shorter than reading its weights, and more rows add arithmetic and keys. `products` is the same for a program
that only multiplies every matrix: what it lacks to the step is attention, norms, the draw and the gaps between.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping
from statistics import median

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from bench.bandwidth import Reader
from bench.record import machine, parser, record, show
from engine.core.plan import COUNT, DRAW, ROW, START
from engine.models.config import ModelConfig, from_hf
from engine.models.project import Method, column_parallel
from engine.planning import weights_bytes
from engine.runner.buckets import Bucket
from engine.runner.runner import Model, Runner
from engine.runner.state import Sizes
from engine.weights.drawn import random_weights
from engine.weights.source import resolve
from pallas_kernels.target import CPU
from sharding.mesh import MeshSpec, lane_meshes

AIMS = {1: 1.3, 4: 1.6, 16: 2.5}
BLOCK = 16
MATRICES = ("wqkv_DX", "wo_XD", "wgu_DX", "wd_FD")
RUN_S = 0.3  # how long a run of steps lasts, about
QWEN3_06B = {
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "num_hidden_layers": 28,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
}


def shape_of(name: str, layers: int | None) -> ModelConfig:
    """The config of `qwen3-0.6b` or of any model that can be served, with fewer layers if asked for."""
    config = from_hf(QWEN3_06B if name == "qwen3-0.6b" else resolve(name).config())
    if layers is None:
        return config
    return dataclasses.replace(config, num_layers=layers, windows=config.windows[:layers])


def make(config: ModelConfig, weights: Mapping, mesh: Mesh, rows: int, positions: int) -> Callable[[], None]:
    """A function that runs one decode step of `rows` rows that see `positions` positions, and waits for it."""
    runner, packed = prepared(config, weights, mesh, rows, positions, np.dtype(np.float32), BLOCK)
    program = runner.programs[runner.buckets[0]]

    def step() -> None:
        runner.state, result = program.run(weights, runner.state, runner.draws, packed)
        np.asarray(result)

    return step


def prepared(
    config: ModelConfig, weights: Mapping, mesh: Mesh, rows: int, positions: int, dtype: np.dtype, block: int
) -> tuple[Runner, np.ndarray]:
    """A runner whose one program is that step, over scattered blocks, and the step's plan."""
    columns = -(-(positions + 1) // block)
    sizes = Sizes(rows * columns + 1, block, rows, columns * block)
    runner = Runner(Model(config, weights, mesh, dtype, "fast"), sizes, (Bucket(rows, rows, True, False),))
    runner.warm_up()
    rng = np.random.default_rng(0)
    history = rng.integers(0, config.vocab, runner.state.history_RS.shape).astype(np.int32)
    table = 1 + rng.permutation(rows * columns).astype(np.int32).reshape(rows, columns)
    where = runner.state.history_RS.sharding
    history, table = jax.device_put((history, table), where)
    runner.state = runner.state._replace(history_RS=history, table_RM=table)
    packed = np.zeros((rows, 6), np.int32)
    packed[:, ROW] = np.arange(rows)
    packed[:, START] = positions - 1
    packed[:, COUNT] = packed[:, DRAW] = 1
    return runner, packed


def products(weights: Mapping, mesh: Mesh, rows: int) -> Callable[[], None]:
    """A function that multiplies every matrix with `rows` rows, as the decoder does, and does nothing else."""
    how = Method("fast", CPU)
    matrices = [layer[name] for layer in weights["layers"] for name in MATRICES] + [weights["head_DV"]]

    def local(matrices: list[jax.Array]) -> jax.Array:
        carried = jnp.float32(0)
        for w_DX in matrices:  # each waits for the one before, as in a decoder
            x_BD = jnp.full((rows, w_DX.shape[0]), carried)
            carried = 1e-9 * column_parallel(x_BD, w_DX, [], how)[0, 0]
        return carried

    specs = [w.sharding.spec for w in matrices]
    mapped = jax.shard_map(local, mesh=mesh, in_specs=(specs,), out_specs=PartitionSpec(), check_vma=False)
    run = jax.jit(mapped).lower(matrices).compile()
    return lambda: jax.block_until_ready(run(matrices))


def measure(step: Callable[[], None], reader: Reader, pairs: int) -> dict[str, float]:
    """Medians over `pairs` runs of steps, each between two readings."""
    step()
    began = time.perf_counter()
    step()
    count = max(int(RUN_S / (time.perf_counter() - began)), 1)
    reads, steps = [_best(reader)], []
    for _ in range(pairs):
        began = time.perf_counter()
        for _ in range(count):
            step()
        steps.append((time.perf_counter() - began) / count)
        reads.append(_best(reader))
    floors = [(before + after) / 2 for before, after in zip(reads, reads[1:], strict=False)]
    ratios = sorted(took / floor for took, floor in zip(steps, floors, strict=True))
    return {
        "step ms": median(steps) * 1e3,
        "read ms": median(reads) * 1e3,
        "read GB/s": reader.num_bytes / median(reads) / 1e9,
        "ratio": median(ratios),
        "ratio low": ratios[0],
        "ratio high": ratios[-1],
    }


def _best(reader: Reader) -> float:
    return min(reader.seconds() for _ in range(3))


def main(arguments: list[str]) -> int:
    """Measure every model at every number of rows."""
    options = parser("decode", __doc__)
    options.add_argument("--models", default="embedded,qwen3-0.6b", help="shapes; weights are random")
    options.add_argument("--layers", type=int, help="of each model, instead of all")
    options.add_argument("--rows", default="1,4,16")
    options.add_argument("--positions", type=int, default=256)
    options.add_argument("--pairs", type=int, default=9, help="runs of steps, each between two readings")
    chosen = options.parse_args(arguments)
    jax.config.update("jax_platforms", "cpu")
    lines = []
    for name in chosen.models.split(","):
        config = shape_of(name, chosen.layers)
        mesh = lane_meshes(MeshSpec(), config.heads, config.kv_heads)[0]
        weights = random_weights(config, mesh, np.dtype(np.float32))
        with Reader(weights_bytes(config, 1, 4), machine()["cores"]) as reader:
            for rows in map(int, chosen.rows.split(",")):
                alone = measure(products(weights, mesh, rows), reader, chosen.pairs)
                figures = measure(make(config, weights, mesh, rows, chosen.positions), reader, chosen.pairs)
                about = {"model": name, "layers": config.num_layers, "rows": rows}
                extra = {"aim": AIMS.get(rows), "products ms": alone["step ms"], "products ratio": alone["ratio"]}
                lines.append({**about, **figures, **extra})
    show(f"decode step over {chosen.positions} positions, float32, beside one reading of the weights", lines)
    record("decode", arguments).append(lines, chosen.out)
    return 0
