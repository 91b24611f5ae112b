"""The state of a flax.nnx module trained elsewhere, as tensors that load like those of any folder.

    nnx.state(module, nnx.Param) --flatten, rename--> Tensors --assemble--> weights on a lane's mesh

A module whose attributes are named as in Hugging Face needs no table: `model.layers.0.mlp.up_proj.kernel` becomes
`model.layers.0.mlp.up_proj.weight`. Any other names go through a small table of prefixes or whole names, in which
`{}` stands for one name or number: {"blocks.{}.attn.query": "model.layers.{}.self_attn.q_proj"}.

nnx keeps kernels as [in, out], and with axes apart, such as [D, N, H]; they are turned to [out, in] here.
Cost: host memory of one array; a leaf is fetched whole, whatever mesh it is sharded on.
"""

import re
import threading
from collections.abc import Mapping

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from engine.errors import ModelError
from engine.models.config import ModelConfig
from engine.weights.files import bare
from engine.weights.layout import Index, parameters
from engine.weights.load import Progress, Weights, assemble
from engine.weights.tensors import Tensor

LEAVES = {"kernel": "weight", "embedding": "weight", "scale": "weight", "bias": "bias", "weight": "weight"}
ORIGIN = "the nnx state"


def from_state(
    state: nnx.State | nnx.Module,
    config: ModelConfig,
    mesh: Mesh,
    dtype: np.dtype,
    *,
    table: Mapping[str, str] | None = None,
    allow_non_finite: bool = False,
    progress: Progress | None = None,
) -> Weights:
    """The weights of a trained nnx module on a lane's mesh.

    state  the module itself (its Params are taken) or its state
    table  prefix of a path in the state -> prefix of a Hugging Face name; the longest prefix that fits is taken
    Raises ModelError, naming the leaf, for what does not fit `config`.
    """
    tensors = StateTensors(state, config, table or {})
    return assemble(tensors, config, mesh, dtype, allow_non_finite=allow_non_finite, progress=progress)


class StateTensors:
    """`Tensors` of an nnx state."""

    def __init__(self, state: nnx.State | nnx.Module, config: ModelConfig, table: Mapping[str, str]):
        if isinstance(state, nnx.Module):
            state = nnx.state(state, nnx.Param)
        wanted = {part.name: part.shape for row in parameters(config, 1) for part in row.parts}
        self._leaves: dict[str, tuple[jax.Array, bool]] = {}
        self._described: dict[str, Tensor] = {}
        for path, variable in nnx.to_flat_state(state):
            name, turned = _rename(".".join(str(step) for step in path), table)
            if name in self._leaves:
                raise ModelError(f"{bare(name)}: two leaves of {ORIGIN} have this name", field=name)
            value = variable[...] if isinstance(variable, nnx.Variable) else variable
            shape = _file_shape(value.shape, wanted.get(name), turned)
            self._leaves[name] = value, turned
            self._described[name] = Tensor(shape, np.dtype(value.dtype).name, ORIGIN)
        self._lock = threading.Lock()
        self._fetched: dict[str, np.ndarray] = {}

    @property
    def described(self) -> Mapping[str, Tensor]:
        return self._described

    def read(self, name: str, cut: Index) -> np.ndarray:
        with self._lock:
            if name not in self._fetched:
                value, turned = self._leaves[name]
                shape = self._described[name].shape
                whole = np.asarray(jax.device_get(value))
                self._fetched[name] = whole.reshape(shape[::-1]).T if turned else whole.reshape(shape)
        return self._fetched[name][cut]

    def settle(self) -> None:
        self._fetched.clear()

    def finish(self) -> None:
        """Arrays do not change."""

    def close(self) -> None:
        """There are no files."""


def _rename(path: str, table: Mapping[str, str]) -> tuple[str, bool]:
    """(Hugging Face name, whether the leaf is [in, out]) of a leaf of the state."""
    stem, _, leaf = path.rpartition(".")
    fits = [(pattern, match) for pattern in table if (match := re.match(_pattern(pattern), path))]
    if fits:
        pattern, match = max(fits, key=lambda fit: fit[1].end())
        named = table[pattern].format(*match.groups()) + path[match.end() :]
        if match.end() == len(path):
            return named, leaf == "kernel"
        stem = named.rpartition(".")[0]
    if leaf not in LEAVES:
        raise ModelError(
            f"{bare(path)} in {ORIGIN}: expected a leaf named {', '.join(LEAVES)}, or a row of the table",
            field=path,
        )
    return f"{stem}.{LEAVES[leaf]}", leaf == "kernel"


def _pattern(prefix: str) -> str:
    """A regular expression for whole steps of a path."""
    return r"([^.]+)".join(re.escape(piece) for piece in prefix.split("{}")) + r"(?=\.|$)"


def _file_shape(shape: tuple[int, ...], wanted: tuple[int, ...] | None, turned: bool) -> tuple[int, ...]:
    """The shape as a file would have it; axes that are apart are merged when that gives the wanted shape."""
    target = wanted if wanted is None or not turned else wanted[::-1]
    if target is not None and _merges(shape, target):
        return wanted
    return shape[::-1] if turned else shape


def _merges(shape: tuple[int, ...], target: tuple[int, ...]) -> bool:
    """Whether joining neighbouring axes of `shape` gives `target`."""
    sizes = list(shape)
    for size in target:
        joined = 1
        while sizes and joined < size:
            joined *= sizes.pop(0)
        if joined != size:
            return False
    return not sizes
