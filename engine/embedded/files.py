"""Writes the embedded model as an ordinary Hugging Face folder, and reads its weights back.

    config.json  generation_config.json  tokenizer.json  tokenizer_config.json  model.safetensors (bfloat16)

A reader never meets half a file: each is written beside its place and then renamed.
"""

import json
import os
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from engine.embedded.corpus import END_OF_TEXT, SPECIAL_TOKENS, TURN_END
from engine.embedded.network import Shape, Weights

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def train_tokenizer(documents: list[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE; every byte has a token, so that any text survives encoding and decoding."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def write_description(out: Path, shape: Shape, tokenizer: Tokenizer) -> None:
    """Writes everything but the weights."""
    end, turn_end = tokenizer.token_to_id(END_OF_TEXT), tokenizer.token_to_id(TURN_END)
    out.mkdir(parents=True, exist_ok=True)
    _write_text(out / "tokenizer.json", tokenizer.to_str(pretty=False))
    _write_json(out / "config.json", _config(shape, end))
    generation = {
        "bos_token_id": end,
        "eos_token_id": [end, turn_end],
        "pad_token_id": end,
        "do_sample": True,
        "temperature": 0.7,
        "top_p": 0.95,
    }
    _write_json(out / "generation_config.json", generation)
    added = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    tokens = {str(tokenizer.token_to_id(token)): {"content": token, **added} for token in SPECIAL_TOKENS}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "added_tokens_decoder": tokens,
        "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
        "bos_token": None,
        "eos_token": TURN_END,
        "pad_token": END_OF_TEXT,
        "unk_token": None,
        "add_bos_token": False,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": shape.max_positions,
        "chat_template": CHAT_TEMPLATE,
    }
    _write_json(out / "tokenizer_config.json", settings)


def _config(shape: Shape, end_id: int) -> dict:
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": end_id,
        "eos_token_id": end_id,
        "head_dim": shape.head_width,
        "hidden_act": "silu",
        "hidden_size": shape.width,
        "initializer_range": 0.02,
        "intermediate_size": shape.ffn_width,
        "max_position_embeddings": shape.max_positions,
        "num_attention_heads": shape.num_query_heads,
        "num_hidden_layers": shape.num_layers,
        "num_key_value_heads": shape.num_kv_heads,
        "rms_norm_eps": shape.norm_eps,
        "rope_scaling": None,
        "rope_theta": shape.rope_theta,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": shape.vocab_size,
    }


def write_weights(out: Path, weights: Weights) -> None:
    """Writes model.safetensors in bfloat16."""
    rounded = {name: np.asarray(value).astype(jnp.bfloat16) for name, value in weights.items()}
    partial = out / "model.safetensors.partial"
    # Hugging Face refuses a file whose metadata names no framework.
    save_file(rounded, partial, metadata={"format": "pt"})
    partial.chmod(0o644)
    os.replace(partial, out / "model.safetensors")


def read_weights(folder: Path) -> Weights:
    """The saved weights in float32."""
    saved = load_file(folder / "model.safetensors")
    return {name: jnp.asarray(value.astype(np.float32)) for name, value in saved.items()}


def _write_json(path: Path, value: dict) -> None:
    _write_text(path, json.dumps(value, indent=2) + "\n")


def _write_text(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
