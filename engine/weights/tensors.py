"""What the weights are read from: named tensors with shapes and dtypes, of which any slice can be had.

    folder of safetensors (safetensors_files.py) --.
    Orbax artifact        (artifact.py)            |--> Tensors --> load.py --> arrays on a mesh
    state of an nnx module (nnx.py)              --'

Here too stands what all of them must agree with: the names, shapes and dtypes that a ModelConfig asks for.
Cost: a few microseconds a tensor; no weight is read.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple, Protocol

import jax.numpy as jnp
import numpy as np

from engine.errors import ConfigError, ModelError, wrong
from engine.models.config import ModelConfig
from engine.weights.files import bare
from engine.weights.layout import Index, parameters

DTYPES = {name: np.dtype(getattr(jnp, name)) for name in ("float32", "bfloat16", "float16")}
FROM_CONFIG = "auto"
# Buffers that older exports carry along; they are computed here.
BUFFERS = re.compile(r"(^|\.)rotary_emb\.(inv_freq|cos_cached|sin_cached)$")
TIED_HEAD = "lm_head.weight"
NAMES_SHOWN = 4


class Tensor(NamedTuple):
    """What is known of a tensor before it is read."""

    shape: tuple[int, ...]
    dtype: str  # of numpy, as it is stored: "bfloat16", "float32", "int8", ...
    origin: str  # the file that holds it, for messages


class Tensors(Protocol):
    """Named tensors, in the layout of Hugging Face: [out, in]."""

    @property
    def described(self) -> Mapping[str, Tensor]:
        """Every tensor there is."""

    def read(self, name: str, cut: Index) -> np.ndarray:
        """The slice `cut` of a tensor. Raises ModelError when it cannot be read or is not what was described."""

    def settle(self) -> None:
        """An array is complete: whatever was kept to read its other parts may go."""

    def finish(self) -> None:
        """All is read. Raises ModelError when what was read has changed meanwhile."""

    def close(self) -> None:
        """Lets go of files."""


def check_tensors(tensors: Tensors, config: ModelConfig) -> None:
    """Raises ModelError, naming the tensor, unless there is exactly what `config` asks for, in a floating dtype."""
    found = tensors.described
    wanted = {part.name: part.shape for parameter in parameters(config, 1) for part in parameter.parts}
    if missing := [name for name in wanted if name not in found]:
        raise ModelError(f"{_some(missing)}: missing; {len(found)} tensors are there", field=missing[0])
    extra = [name for name in found if name not in wanted and not _tolerated(name, config)]
    if extra:
        raise ModelError(
            f"{_some(extra)}: unexpected in {found[extra[0]].origin}; {config.architecture} has no such tensor",
            field=extra[0],
        )
    for name, shape in wanted.items():
        _check_tensor(name, found[name], shape)


def check_vocabulary(tokenizer_size: int, config: ModelConfig) -> None:
    """Raises ModelError when the tokenizer knows ids that have no embedding row.

    Rows past the tokenizer's ids are usual (vocabularies are rounded up) and are accepted.
    """
    if tokenizer_size < 1:
        raise ModelError(
            f"tokenizer: it has 0 tokens and the model {config.vocab} embedding rows; expected some",
            field="tokenizer",
        )
    if tokenizer_size > config.vocab:
        raise ModelError(
            f"tokenizer: it has {tokenizer_size} tokens but the model only {config.vocab} embedding rows; "
            "expected the tokenizer of this model",
            field="tokenizer",
        )


def choose_dtype(flag: str, hf_config: Mapping[str, object]) -> np.dtype:
    """The dtype to serve in: the flag, or with `auto` the one config.json names (`dtype` or `torch_dtype`).

    A config that names none means float32, as it does to transformers.
    """
    if flag != FROM_CONFIG:
        if flag not in DTYPES:
            raise ConfigError(wrong("dtype", flag, f"{FROM_CONFIG}, {', '.join(DTYPES)}"), field="dtype")
        return DTYPES[flag]
    key = "dtype" if hf_config.get("dtype") is not None else "torch_dtype"
    named = hf_config.get(key)
    name = "float32" if named is None else str(named).removeprefix("torch.")
    if name not in DTYPES:
        raise ModelError(wrong(f"config.json: {key}", named, f"one of {', '.join(DTYPES)}"), field=key)
    return DTYPES[name]


def _tolerated(name: str, config: ModelConfig) -> bool:
    return BUFFERS.search(name) is not None or (config.tied and name == TIED_HEAD)


def _check_tensor(name: str, found: Tensor, shape: tuple[int, ...]) -> None:
    if found.dtype not in DTYPES:
        raise ModelError(
            f"{name} in {found.origin}: got dtype {found.dtype}; expected {', '.join(DTYPES)}", field=name
        )
    if found.shape != shape:
        hint = " (it is transposed)" if found.shape == shape[::-1] else ""
        raise ModelError(
            f"{name} in {found.origin}: got shape {list(found.shape)}{hint}; config.json wants {list(shape)}",
            field=name,
        )


def _some(names: list[str]) -> str:
    """The first few of `names`, and how many more there are."""
    text = ", ".join(bare(name) for name in names[:NAMES_SHOWN])
    return text if len(names) <= NAMES_SHOWN else f"{text} and {len(names) - NAMES_SHOWN} more"
