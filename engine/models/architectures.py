"""Which decoder an architecture is, as a table: a new dense family is one row.

A row says what the decoder does (a flag, or the name of the config key that holds the flag), which rule gives the
sliding windows, and what a key means when the file leaves it out. The defaults are those that the family's own
configuration class declares in transformers, so a file that is served there is served the same here.

    rule "none"    every layer attends to everything
    rule "all"     `sliding_window` holds for every layer, null is none
    rule "upper"   with `use_sliding_window`: `layer_types` names the layers, else those from `max_window_layers` up
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Architecture:
    """What one family adds to the plain pre-norm decoder with gated SiLU and rotate-half RoPE.

    kv_heads    key/value heads when the file names none; None is one per query head
    head_width  width of a head when the file names none; None is width / heads
    """

    qk_norm: bool
    qkv_bias: bool | str
    o_bias: bool | str
    mlp_bias: bool | str
    windows: Literal["none", "all", "upper"]
    defaults: Mapping[str, object]
    kv_heads: int | None = None
    head_width: int | None = None


SHARED = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False}
WINDOWED = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28, "layer_types": None}

ARCHITECTURES: Mapping[str, Architecture] = {
    "LlamaForCausalLM": Architecture(
        qk_norm=False,
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        mlp_bias="mlp_bias",
        windows="none",
        defaults=SHARED | {"max_position_embeddings": 2048, "attention_bias": False, "mlp_bias": False},
    ),
    "MistralForCausalLM": Architecture(
        qk_norm=False,
        qkv_bias=False,
        o_bias=False,
        mlp_bias=False,
        windows="all",
        defaults=SHARED | {"max_position_embeddings": 131072, "sliding_window": 4096},
        kv_heads=8,
    ),
    "Qwen2ForCausalLM": Architecture(
        qk_norm=False,
        qkv_bias=True,
        o_bias=False,
        mlp_bias=False,
        windows="upper",
        defaults=SHARED | WINDOWED | {"max_position_embeddings": 32768},
        kv_heads=32,
    ),
    "Qwen3ForCausalLM": Architecture(
        qk_norm=True,
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        mlp_bias=False,
        windows="upper",
        defaults=SHARED | WINDOWED | {"max_position_embeddings": 32768, "attention_bias": False},
        kv_heads=32,
        head_width=128,
    ),
}
