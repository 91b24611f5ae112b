"""Small model folders for the tests of this package."""

import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from safetensors.numpy import save_file

from engine.models.config import ModelConfig, from_hf
from engine.weights.layout import parameters

HF = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_act": "silu",
    "hidden_size": 24,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 61,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "torch_dtype": "float32",
}


def hf(**changes) -> dict:
    return HF | changes


def config(**changes) -> ModelConfig:
    return from_hf(hf(**changes))


def shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    return {part.name: part.shape for parameter in parameters(model, 1) for part in parameter.parts}


def tensors(model: ModelConfig, dtype: str = "float32", seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {name: random.standard_normal(shape).astype(np.dtype(dtype)) for name, shape in shapes(model).items()}


def write(folder: Path, weights: dict[str, np.ndarray] | None = None, files: int = 1, **changes) -> Path:
    """A Hugging Face folder with `files` safetensors files; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = tensors(config(**changes)) if weights is None else weights
    (folder / "config.json").write_text(json.dumps(hf(**changes)))
    (folder / "tokenizer.json").write_text("{}")
    if files == 1:
        save_file(weights, folder / "model.safetensors")
        return folder
    weight_map = {}
    for number in range(files):
        name = f"model-{number + 1:05}-of-{files:05}.safetensors"
        part = dict(list(weights.items())[number::files])
        save_file(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.fixture(scope="session")
def folders() -> ModuleType:
    """The functions above."""
    return sys.modules[__name__]
