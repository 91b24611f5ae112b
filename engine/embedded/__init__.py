"""The embedded model: a small Qwen3 whose files stand beside this module, so that Serac serves without a download.

This module imports the standard library alone; `train` and its neighbours, which make the files, import JAX.
"""

from pathlib import Path


def folder() -> Path:
    """The folder of the model's files: config.json, tokenizer.json, model.safetensors and their companions."""
    return Path(__file__).resolve().parent
