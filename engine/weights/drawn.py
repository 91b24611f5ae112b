"""Random weights for a config, the same on every mesh: for benches and tests.

    (seed, name of a tensor on disk) --PCG64--> the whole logical tensor --layout--> each device's part

Matrices have a standard deviation of 0.9 / sqrt(inputs), norm weights are 1 + 0.1 normal, biases 0.1 normal: wide
enough that the output of a small model reacts when one token of its prompt changes, which the usual 0.02 does not
give. `draw` with `period` None is a recipe that other code can repeat to have the same weights.

Cost: one tensor on the host at a time. Above `PERIOD` values a tensor repeats itself, so that a model of billions
of weights is made at the speed of copying; a bench does not notice.
"""

import math
import zlib
from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import Mesh

from engine.models.config import ModelConfig
from engine.weights.layout import Parameter, parameters, read_part
from sharding.rules import TENSOR, place

PERIOD = 4_194_301  # a prime, so that no row of a matrix lines up with another


def draw(seed: int, name: str, shape: tuple[int, ...], dtype: np.dtype, period: int | None = None) -> np.ndarray:
    """The tensor `name` (a name and a shape of the folder on disk), whatever the mesh.

    period   the values repeat after so many; None draws each
    """
    rng = np.random.Generator(np.random.PCG64([seed, zlib.crc32(name.encode())]))
    count = math.prod(shape)
    values = rng.standard_normal(count if period is None else min(count, period), dtype=np.float32)
    if len(shape) > 1:
        values *= 0.9 / math.sqrt(shape[1])
    else:
        values *= 0.1
        values += float(name.endswith("norm.weight"))
    return np.resize(values.astype(dtype), shape)


def random_weights(config: ModelConfig, mesh: Mesh, dtype: np.dtype, seed: int = 0) -> Mapping:
    """Weights on a lane's mesh, as `engine.weights.layout` names and places them."""
    weights: dict = {"layers": tuple({} for _ in range(config.num_layers))}
    for parameter in parameters(config, mesh.size):
        *outer, name = parameter.path
        target = weights["layers"][outer[1]] if outer else weights
        target[name] = _array(parameter, mesh, np.dtype(dtype), seed)
    return weights


def _array(parameter: Parameter, mesh: Mesh, dtype: np.dtype, seed: int) -> jax.Array:
    whole = {part.name: draw(seed, part.name, part.shape, dtype, PERIOD) for part in parameter.parts}

    def local(index: tuple[slice, ...]) -> np.ndarray:
        return read_part(parameter, parameter.shard(index), lambda name, cut: whole[name][cut], dtype)

    sharding = place(parameter.letters, parameter.shape, TENSOR, mesh)
    return jax.make_array_from_callback(parameter.shape, sharding, local)
