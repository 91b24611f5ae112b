"""config.json is read as transformers reads it, and what cannot be served is refused by the name of its key."""

import json
import math

import pytest

from engine.errors import ModelError
from engine.models.architectures import ARCHITECTURES
from engine.models.config import Rope, from_hf

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
}
QWEN2 = LLAMA | {"architectures": ["Qwen2ForCausalLM"]}
QWEN3 = LLAMA | {"architectures": ["Qwen3ForCausalLM"]}
MISTRAL = LLAMA | {"architectures": ["MistralForCausalLM"]}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def without(config, key):
    return {name: value for name, value in config.items() if name != key}


def rope_of(**keys):
    return from_hf(LLAMA | keys).rope


def test_a_plain_llama_is_read():
    config = from_hf(LLAMA)
    assert (config.width, config.ffn, config.num_layers, config.vocab) == (64, 160, 3, 300)
    assert (config.heads, config.kv_heads, config.head_width, config.context) == (8, 2, 8, 512)
    assert config.norm_eps == 1e-5 and config.rope == Rope("default", 10000.0)
    assert not (config.tied or config.qk_norm or config.qkv_bias or config.o_bias or config.mlp_bias)
    assert config.windows == (None, None, None)


def test_absent_keys_take_the_defaults_of_their_family():
    bare = without(without(without(LLAMA, "num_key_value_heads"), "max_position_embeddings"), "rms_norm_eps")
    config = from_hf(bare)
    assert (config.kv_heads, config.context, config.norm_eps) == (8, 2048, 1e-6)
    assert from_hf(without(MISTRAL, "num_key_value_heads")).kv_heads == 8
    assert from_hf(QWEN3).head_width == 128
    assert from_hf(without(QWEN3, "num_key_value_heads") | {"num_attention_heads": 64}).kv_heads == 32
    assert from_hf(LLAMA | {"num_key_value_heads": None, "head_dim": None}).kv_heads == 8


@pytest.mark.parametrize(
    ("config", "biases"),
    [
        (LLAMA, (False, False, False)),
        (LLAMA | {"attention_bias": True}, (True, True, False)),
        (LLAMA | {"mlp_bias": True}, (False, False, True)),
        (MISTRAL | {"attention_bias": True}, (False, False, False)),
        (QWEN2, (True, False, False)),
        (QWEN3 | {"attention_bias": True}, (True, True, False)),
    ],
)
def test_biases_follow_the_family_and_its_keys(config, biases):
    read = from_hf(config)
    assert (read.qkv_bias, read.o_bias, read.mlp_bias) == biases


def test_only_qwen3_norms_queries_and_keys():
    assert [from_hf(config).qk_norm for config in (LLAMA, MISTRAL, QWEN2, QWEN3)] == [False, False, False, True]


def test_a_head_may_be_wider_than_its_share_of_the_width():
    assert from_hf(LLAMA | {"head_dim": 32}).head_width == 32
    assert from_hf(LLAMA | {"head_dim": 32, "hidden_size": 63}).width == 63


@pytest.mark.parametrize(
    ("config", "windows"),
    [
        (LLAMA | {"sliding_window": 5}, (None, None, None)),
        (MISTRAL | {"sliding_window": 5}, (5, 5, 5)),
        (MISTRAL | {"sliding_window": None}, (None, None, None)),
        (MISTRAL | {"max_position_embeddings": 8192}, (4096, 4096, 4096)),
        (MISTRAL | {"sliding_window": 512}, (None, None, None)),
        (QWEN2 | {"sliding_window": 5}, (None, None, None)),
        (QWEN2 | {"sliding_window": 5, "use_sliding_window": True}, (None, None, None)),
        (QWEN2 | {"sliding_window": 5, "use_sliding_window": True, "max_window_layers": 1}, (None, 5, 5)),
        (
            QWEN3
            | {
                "sliding_window": 5,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            },
            (5, None, 5),
        ),
        (QWEN3 | {"layer_types": ["sliding_attention"] * 3}, (None, None, None)),
    ],
)
def test_windows_follow_the_rule_of_the_family(config, windows):
    assert from_hf(config).windows == windows


def test_rope_is_read_from_the_older_and_the_newer_form():
    old = rope_of(rope_theta=500000.0, rope_scaling=LLAMA3 | {"original_max_position_embeddings": 64})
    new = rope_of(rope_parameters=LLAMA3 | {"original_max_position_embeddings": 64, "rope_theta": 500000.0})
    assert old == new == Rope("llama3", 500000.0, factor=8.0, original_context=64, low=1.0, high=4.0)
    assert rope_of(rope_scaling={"type": "linear", "factor": 4}) == Rope("linear", 10000.0, factor=4.0)
    assert rope_of(rope_parameters={"rope_theta": 7.0}) == Rope("default", 7.0)
    assert rope_of(rope_theta=7.0, rope_parameters=None, rope_scaling=None) == Rope("default", 7.0)


def test_the_attention_factor_of_yarn_is_given_or_follows_from_the_stretch():
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    assert rope_of(rope_scaling=yarn).attention_factor == pytest.approx(0.1 * math.log(4) + 1)
    assert rope_of(rope_scaling=yarn | {"attention_factor": 1.5}).attention_factor == 1.5
    pair = rope_of(rope_scaling=yarn | {"mscale": 2.0, "mscale_all_dim": 0.5}).attention_factor
    assert pair == pytest.approx((0.2 * math.log(4) + 1) / (0.05 * math.log(4) + 1))
    assert rope_of(rope_scaling=yarn | {"mscale": 2.0}).attention_factor == pytest.approx(0.1 * math.log(4) + 1)
    assert rope_of(rope_scaling=yarn | {"factor": 0.5}).attention_factor == 1.0


def test_yarn_stretches_the_context_that_its_file_states():
    yarn = {"rope_type": "yarn", "factor": 4.0}
    assert from_hf(LLAMA | {"rope_scaling": yarn}).context == 2048
    stated = yarn | {"original_max_position_embeddings": 128}
    assert from_hf(LLAMA | {"rope_scaling": stated}).context == 512
    assert from_hf(LLAMA | {"rope_scaling": without(stated, "factor")}).rope.factor == 4.0


REFUSED = [
    (without(LLAMA, "vocab_size"), "vocab_size", "absent"),
    (without(LLAMA, "hidden_size"), "hidden_size", "absent"),
    (without(LLAMA, "num_hidden_layers"), "num_hidden_layers", "absent"),
    (without(LLAMA, "intermediate_size"), "intermediate_size", "absent"),
    (without(LLAMA, "num_attention_heads"), "num_attention_heads", "absent"),
    (without(LLAMA, "architectures"), "architectures", "absent"),
    (LLAMA | {"architectures": ["GPT2LMHeadModel"]}, "architectures", ", ".join(ARCHITECTURES)),
    (LLAMA | {"architectures": []}, "architectures", "one of"),
    (LLAMA | {"architectures": [["LlamaForCausalLM"]]}, "architectures", "one of"),
    (LLAMA | {"architectures": "LlamaForCausalLM"}, "architectures", "one of"),
    (LLAMA | {"vocab_size": 0}, "vocab_size", "got 0"),
    (LLAMA | {"vocab_size": 2**40}, "vocab_size", "2147483647"),
    (LLAMA | {"vocab_size": "300"}, "vocab_size", "integer"),
    (LLAMA | {"vocab_size": 300.0}, "vocab_size", "integer"),
    (LLAMA | {"vocab_size": True}, "vocab_size", "integer"),
    (LLAMA | {"num_hidden_layers": 2**30}, "num_hidden_layers", "1024"),
    (LLAMA | {"num_attention_heads": 0}, "num_attention_heads", "got 0"),
    (LLAMA | {"num_attention_heads": 7}, "num_attention_heads", "head_dim is absent"),
    (LLAMA | {"num_key_value_heads": 3}, "num_key_value_heads", "divisor of num_attention_heads 8"),
    (LLAMA | {"num_key_value_heads": 16}, "num_key_value_heads", "divisor"),
    (LLAMA | {"head_dim": 7}, "head_dim", "even"),
    (LLAMA | {"hidden_size": 8}, "head_dim", "even"),
    (LLAMA | {"head_dim": -2}, "head_dim", "integer"),
    (LLAMA | {"rms_norm_eps": math.nan}, "rms_norm_eps", "finite"),
    (LLAMA | {"rms_norm_eps": 0.0}, "rms_norm_eps", "> 0"),
    (LLAMA | {"rms_norm_eps": None}, "rms_norm_eps", "finite"),
    (LLAMA | {"tie_word_embeddings": "no"}, "tie_word_embeddings", "true or false"),
    (LLAMA | {"attention_bias": 1}, "attention_bias", "true or false"),
    (LLAMA | {"hidden_act": "gelu"}, "hidden_act", "silu"),
    (LLAMA | {"partial_rotary_factor": 0.5}, "partial_rotary_factor", "whole heads"),
    (LLAMA | {"auto_map": {"AutoModel": "code.Model"}}, "auto_map", "refused"),
    (LLAMA | {"rope_theta": math.inf}, "rope_theta", "finite"),
    (LLAMA | {"rope_theta": 1.0}, "rope_theta", "> 1"),
    (LLAMA | {"rope_scaling": "linear"}, "rope_scaling", "object"),
    (
        LLAMA | {"rope_scaling": {"rope_type": "longrope"}},
        "rope_scaling.rope_type",
        "default, linear, llama3, yarn",
    ),
    (LLAMA | {"rope_parameters": {"rope_type": "mrope"}}, "rope_parameters.rope_type", "got 'mrope'"),
    (LLAMA | {"rope_scaling": {"type": ["yarn"]}}, "rope_scaling.rope_type", "one of"),
    (LLAMA | {"rope_scaling": {"factor": 2.0}}, "rope_scaling.rope_type", "absent"),
    (LLAMA | {"rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, "rope_parameters.rope_type", "absent"),
    (LLAMA | {"rope_scaling": {"type": "linear"}}, "rope_scaling.factor", "absent"),
    (LLAMA | {"rope_scaling": {"type": "linear", "factor": 0}}, "rope_scaling.factor", "> 0"),
    (LLAMA | {"rope_scaling": without(LLAMA3, "low_freq_factor")}, "rope_scaling.low_freq_factor", "absent"),
    (
        LLAMA | {"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}},
        "rope_scaling.high_freq_factor",
        "low_freq_factor",
    ),
    (
        LLAMA | {"rope_scaling": {"type": "yarn", "factor": 4, "truncate": 1}},
        "rope_scaling.truncate",
        "true or false",
    ),
    (
        LLAMA | {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}},
        "rope_parameters.partial_rotary_factor",
        "whole heads",
    ),
    (MISTRAL | {"sliding_window": 0}, "sliding_window", "got 0"),
    (
        QWEN2 | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": -1},
        "max_window_layers",
        "0..",
    ),
    (
        QWEN2 | {"use_sliding_window": True, "sliding_window": 5, "layer_types": ["full_attention"]},
        "layer_types",
        "3",
    ),
    (QWEN2 | {"use_sliding_window": True, "sliding_window": 5, "layer_types": [1, 2, 3]}, "layer_types", "sliding"),
]


@pytest.mark.parametrize(
    ("config", "key", "says"), REFUSED, ids=lambda value: value if isinstance(value, str) else ""
)
def test_a_broken_config_is_refused_by_the_name_of_its_key(config, key, says):
    with pytest.raises(ModelError) as refused:
        from_hf(config)
    assert refused.value.field == key
    assert str(refused.value).startswith(f"{key}: got ") and says in str(refused.value)


@pytest.mark.parametrize("broken", [[], None, "{}", 3])
def test_a_config_that_is_no_object_is_refused(broken):
    with pytest.raises(ModelError, match=r"config\.json: got .*; expected a JSON object"):
        from_hf(broken)


def test_any_one_key_of_any_wrong_type_gives_a_config_or_a_refusal():
    wrong = [None, True, -1, 0, 2**70, 1e308, math.nan, "x", [], {}, [[]], {"a": {}}]
    for key in LLAMA | {"rope_scaling": 0, "rope_theta": 0, "head_dim": 0, "layer_types": 0, "sliding_window": 0}:
        for config in (LLAMA, MISTRAL, QWEN2 | {"use_sliding_window": True}, QWEN3):
            for value in wrong:
                try:
                    from_hf(config | {key: value})
                except ModelError as refused:
                    assert refused.field is not None


def test_the_configs_of_the_golden_models_are_read(golden):
    assert golden("qwen3")[0].head_width == 24
    assert json.dumps(golden("qwen2")[0].windows) == "[null, 9, 9]"
