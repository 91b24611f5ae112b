"""From tensors on disk to the weights of a lane: every device reads its own slices and nothing else.

    Tensors --check_tensors--> for each array: per device read, move axes, cast, check --> pytree of jax arrays

Host memory: the parts of one array that this process's devices hold, and what is read for them.
Cost: reading, one transposing copy (about 1 GB/s a core), and a look at every number that takes a tenth of that.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
from jax.sharding import Mesh

from engine.errors import ModelError
from engine.models.config import ModelConfig
from engine.weights.layout import Parameter, blank, fill, parameters, pieces
from engine.weights.source import ModelFolder, open_tensors
from engine.weights.tensors import Tensors, check_tensors
from sharding.rules import TENSOR, place

Progress = Callable[[int, int], None]  # (bytes placed so far, bytes in all) on this process's devices
Weights = dict[str, object]  # the pytree drawn in layout.py
WORKERS = 4  # threads that read, move and check; numpy and the kernel work without the interpreter's lock
BAND = 1 << 18  # numbers looked at together: they stay in a core's cache
EXPONENTS = {  # dtype -> (integer of its size, all bits but the sign, the exponent of what is not finite)
    "float32": (np.uint32, 0x7FFFFFFF, 0x7F800000),
    "bfloat16": (np.uint16, 0x7FFF, 0x7F80),
    "float16": (np.uint16, 0x7FFF, 0x7C00),
}


def load(
    folder: ModelFolder,
    config: ModelConfig,
    mesh: Mesh,
    dtype: np.dtype,
    *,
    allow_non_finite: bool = False,
    progress: Progress | None = None,
) -> Weights:
    """The weights of a model on one lane's mesh, in `dtype` (`tensors.choose_dtype`).

    Raises ModelError, naming file and tensor, for what does not fit `config`, is not finite or changes meanwhile.
    """
    tensors = open_tensors(folder)
    try:
        weights = assemble(tensors, config, mesh, dtype, allow_non_finite=allow_non_finite, progress=progress)
        tensors.finish()
    finally:
        tensors.close()
    return weights


def assemble(
    tensors: Tensors,
    config: ModelConfig,
    mesh: Mesh,
    dtype: np.dtype,
    *,
    allow_non_finite: bool = False,
    progress: Progress | None = None,
) -> Weights:
    """As `load`, from tensors that are open already; the caller finishes and closes them."""
    check_tensors(tensors, config)
    rows = parameters(config, mesh.size)
    total, done = sum(_local_bytes(row, mesh, dtype) for row in rows), 0
    weights: Weights = {"layers": tuple({} for _ in range(config.num_layers))}
    with ThreadPoolExecutor(WORKERS, thread_name_prefix="weights") as pool:
        for row in rows:
            array = _array(tensors, row, mesh, dtype, allow_non_finite, pool)
            home = weights["layers"][row.path[1]] if row.path[0] == "layers" else weights
            home[row.path[-1]] = array
            tensors.settle()
            done += _local_bytes(row, mesh, dtype)
            if progress is not None:
                progress(done, total)
    return weights


def check_finite(array: np.ndarray, name: str) -> None:
    """Raises ModelError when a number in the contiguous `array` is not finite."""
    integer, unsigned, exponent = EXPONENTS[array.dtype.name]
    numbers = array.reshape(-1).view(integer)
    for start in range(0, numbers.size, BAND):
        if np.bitwise_and(numbers[start : start + BAND], integer(unsigned)).max() >= exponent:
            raise ModelError(
                f"{name}: non-finite values in {array.dtype.name}; expected finite ones (or --allow-non-finite)",
                field=name,
            )


def _array(
    tensors: Tensors, row: Parameter, mesh: Mesh, dtype: np.dtype, allow_non_finite: bool, pool: ThreadPoolExecutor
) -> jax.Array:
    sharding = place(row.letters, row.shape, TENSOR, mesh)
    shards = {row.shard(index) for index in sharding.addressable_devices_indices_map(row.shape).values()}
    local = {shard: blank(row, dtype) for shard in shards}
    work = [(local[shard], piece) for shard in shards for piece in pieces(row, shard)]
    for _ in pool.map(lambda todo: fill(*todo, tensors.read), work):
        pass
    if not allow_non_finite:
        for shard, part in local.items():
            _check_part(tensors, row, shard, part)
    return jax.make_array_from_callback(row.shape, sharding, lambda index: local[row.shard(index)])


def _check_part(tensors: Tensors, row: Parameter, shard: int, local: np.ndarray) -> None:
    """Raises ModelError, naming the tensor, when a number of the shard's part is not finite."""
    try:
        check_finite(local, row.name)
    except ModelError:
        for part in row.parts:
            with np.errstate(over="ignore", invalid="ignore"):
                check_finite(tensors.read(part.name, part.cut(shard)).astype(local.dtype), part.name)
        raise


def _local_bytes(row: Parameter, mesh: Mesh, dtype: np.dtype) -> int:
    """Bytes of the row's parts on this process's devices."""
    share = int(np.prod(row.local_shape)) * dtype.itemsize
    return share * sum(device.process_index == jax.process_index() for device in mesh.devices.flat)
