"""What the decoder must know of a model, read from a Hugging Face config.json.

    config.json --from_hf--> ModelConfig: sizes, flags, one window per layer, Rope

Whatever the decoder cannot honour is refused here by the name of its key, before any weight is read: an unknown
architecture, an unknown RoPE variant, another activation, code from the model's folder (`auto_map`).
Source: the meaning and defaults of the keys are those of transformers' configuration classes.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from engine.errors import ModelError, wrong
from engine.models.architectures import ARCHITECTURES, Architecture
from engine.models.fields import Fields

MOST_LAYERS = 1024
PLAIN_ROPE = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}  # all that a section without a type holds


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary position embedding. Numbers that a kind does not use keep their defaults.

    factor            context is stretched this many times (linear, llama3, yarn)
    original_context  positions of pretraining (llama3, yarn)
    low, high         llama3: low_freq_factor, high_freq_factor; yarn: beta_slow, beta_fast
    attention_factor  multiplies cos and sin (yarn)
    truncate          yarn: the ramp starts and ends at whole dimensions
    """

    kind: Literal["default", "linear", "llama3", "yarn"]
    theta: float
    factor: float = 1.0
    original_context: int = 0
    low: float = 1.0
    high: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Sizes and flags of one dense decoder; letters as everywhere (D width, F ffn, N heads, K kv_heads, H, V).

    windows  per layer the positions a token attends to, itself included; None is all of them
    """

    architecture: str
    num_layers: int
    width: int
    ffn: int
    heads: int
    kv_heads: int
    head_width: int
    vocab: int
    context: int
    norm_eps: float
    rope: Rope
    qk_norm: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    tied: bool
    windows: tuple[int | None, ...]


def from_hf(config: Mapping[str, object]) -> ModelConfig:
    """The ModelConfig of a parsed config.json; raises ModelError naming the key that is wrong."""
    if not isinstance(config, Mapping):
        raise ModelError(wrong("config.json", type(config).__name__, "a JSON object"), field="config.json")
    name = _architecture(config)
    row = ARCHITECTURES[name]
    fields = Fields(config, row.defaults)
    if "auto_map" in config:
        raise fields.refuse("auto_map", "code in the model folder", "no such key; refused: such code is never run")
    fields.only("hidden_act", "silu", "the only activation served")
    fields.only("partial_rotary_factor", 1.0, "RoPE turns whole heads")
    heads, head_width, kv_heads = _heads(fields, row)
    layers = fields.integer("num_hidden_layers", 1, MOST_LAYERS)
    context = fields.integer("max_position_embeddings")
    rope = _rope(fields, context)
    if rope.kind == "yarn":  # the file may state the stretched context or the one before stretching
        context = max(context, int(rope.original_context * rope.factor))
    return ModelConfig(
        architecture=name,
        num_layers=layers,
        width=fields.integer("hidden_size"),
        ffn=fields.integer("intermediate_size"),
        heads=heads,
        kv_heads=kv_heads,
        head_width=head_width,
        vocab=fields.integer("vocab_size"),
        context=context,
        norm_eps=fields.number("rms_norm_eps", 0.0, 1.0),
        rope=rope,
        qk_norm=row.qk_norm,
        qkv_bias=_flag(fields, row.qkv_bias),
        o_bias=_flag(fields, row.o_bias),
        mlp_bias=_flag(fields, row.mlp_bias),
        tied=fields.flag("tie_word_embeddings"),
        windows=_windows(fields, row, layers, context),
    )


def _architecture(config: Mapping[str, object]) -> str:
    names = config.get("architectures", "nothing (the key is absent)")
    if isinstance(names, list) and names in [[name] for name in ARCHITECTURES]:
        return str(names[0])
    message = wrong("architectures", names, f"a list of one of {', '.join(ARCHITECTURES)}")
    raise ModelError(message, field="architectures")


def _flag(fields: Fields, flag: bool | str) -> bool:
    return flag if isinstance(flag, bool) else fields.flag(flag)


def _heads(fields: Fields, row: Architecture) -> tuple[int, int, int]:
    """Query heads, width of a head, key/value heads."""
    heads, width = fields.integer("num_attention_heads", 1, 65536), fields.integer("hidden_size")
    if fields.values.get("head_dim", row.head_width) is not None:
        head_width = Fields(fields.values, {"head_dim": row.head_width}).integer("head_dim", 2, 4096)
    elif width % heads:
        raise fields.refuse(
            "num_attention_heads", heads, f"a divisor of hidden_size {width}, as head_dim is absent"
        )
    else:
        head_width = width // heads
    if head_width % 2:
        raise fields.refuse("head_dim", head_width, "an even number (RoPE turns pairs)")
    if fields.values.get("num_key_value_heads", row.kv_heads) is None:
        return heads, head_width, heads
    kv_heads = Fields(fields.values, {"num_key_value_heads": row.kv_heads}).integer("num_key_value_heads", 1, 65536)
    if heads % kv_heads:
        raise fields.refuse("num_key_value_heads", kv_heads, f"a divisor of num_attention_heads {heads}")
    return heads, head_width, kv_heads


def _windows(fields: Fields, row: Architecture, layers: int, context: int) -> tuple[int | None, ...]:
    """One window per layer; a window that no context reaches past is none."""
    if row.windows == "none" or (row.windows == "upper" and not fields.flag("use_sliding_window")):
        return (None,) * layers
    window = fields.optional_integer("sliding_window")
    if window is None or window >= context:
        return (None,) * layers
    if row.windows == "all":
        return (window,) * layers
    types = fields.get("layer_types", "a list or null")
    if types is None:
        first = fields.integer("max_window_layers", 0)
        return tuple(window if layer >= first else None for layer in range(layers))
    known = {"sliding_attention": window, "full_attention": None}
    if (
        not isinstance(types, list)
        or len(types) != layers
        or any(not isinstance(t, str) or t not in known for t in types)
    ):
        raise fields.refuse("layer_types", types, f"{layers} of {', '.join(known)}")
    return tuple(known[kind] for kind in types)


def _rope(fields: Fields, context: int) -> Rope:
    """RoPE from `rope_parameters` (newer files) or `rope_theta` and `rope_scaling`."""
    key = "rope_parameters" if fields.values.get("rope_parameters") is not None else "rope_scaling"
    section = fields.values.get(key)
    section = {} if section is None else section
    if not isinstance(section, Mapping):
        raise fields.refuse(key, section, "an object or null")
    theta = Fields(
        {"rope_theta": fields.values["rope_theta"]} if "rope_theta" in fields.values else {},
        {"rope_theta": 10000.0},
    )
    inner = Fields(section, {"rope_theta": theta.number("rope_theta", 1.0)}, within=f"{key}.")
    untyped = "default" if set(section) <= PLAIN_ROPE else "nothing (the key is absent)"
    kind = section.get("rope_type", section.get("type", untyped))
    if not isinstance(kind, str) or kind not in READ:
        raise inner.refuse("rope_type", kind, f"one of {', '.join(READ)}")
    inner.only("partial_rotary_factor", 1.0, "RoPE turns whole heads")
    return READ[kind](inner, inner.number("rope_theta", 1.0), context)


def _default(fields: Fields, theta: float, context: int) -> Rope:
    return Rope("default", theta)


def _linear(fields: Fields, theta: float, context: int) -> Rope:
    return Rope("linear", theta, factor=fields.number("factor"))


def _llama3(fields: Fields, theta: float, context: int) -> Rope:
    low, high = fields.number("low_freq_factor"), fields.number("high_freq_factor")
    if high <= low:
        raise fields.refuse("high_freq_factor", high, f"more than low_freq_factor {low:g}")
    original = Fields(fields.values, {"original_max_position_embeddings": context}, fields.within)
    return Rope(
        "llama3",
        theta,
        factor=fields.number("factor"),
        original_context=original.integer("original_max_position_embeddings"),
        low=low,
        high=high,
    )


def _yarn(fields: Fields, theta: float, context: int) -> Rope:
    given = {key: value for key, value in fields.values.items() if value is not None}
    unset = {"original_max_position_embeddings": context, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": True}
    fields = Fields(given, unset, fields.within)
    original = fields.integer("original_max_position_embeddings")
    factor = fields.number("factor") if "factor" in given else context / original
    return Rope(
        "yarn",
        theta,
        factor=factor,
        original_context=original,
        low=fields.number("beta_slow"),
        high=fields.number("beta_fast"),
        attention_factor=_yarn_attention(fields, factor),
        truncate=fields.flag("truncate"),
    )


def _yarn_attention(fields: Fields, factor: float) -> float:
    """What cos and sin are multiplied by: given, or from the stretch (0.1 m ln(factor) + 1)."""
    if "attention_factor" in fields.values:
        return fields.number("attention_factor")

    def scale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if "mscale" in fields.values and "mscale_all_dim" in fields.values:
        return scale(fields.number("mscale")) / scale(fields.number("mscale_all_dim"))
    return scale(1.0)


READ = {"default": _default, "linear": _linear, "llama3": _llama3, "yarn": _yarn}
