"""What is planned without a device is what a lane then holds: weights, KV, state, collectives, programs."""

import dataclasses
import io
import json

import jax
import numpy as np
import pytest

from bench.programs import by_kind, collectives, compiled
from engine.cli import main
from engine.config import Settings
from engine.errors import ConfigError
from engine.models.config import from_hf
from engine.plan_report import run
from engine.planning import DEVICES, Choice, Device, decide, device_named, estimate
from engine.runner.buckets import Bucket
from engine.runner.runner import Model, Runner
from engine.runner.state import Sizes
from engine.weights.drawn import random_weights
from engine.weights.source import resolve
from pallas_kernels.target import Target
from sharding.mesh import MeshSpec, lane_meshes

CPU = DEVICES["cpu"]
ODD = {  # widths that neither eighths nor the mesh divide, untied, with biases
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": 48,
    "intermediate_size": 90,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "max_position_embeddings": 256,
    "vocab_size": 101,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}
SIZES = Sizes(num_blocks=9, block_size=16, max_rows=2, max_length=64)


def shard_bytes(tree):
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))


def lane(tp, dtype=np.float32, numerics="fast", kv_dtype=None):
    """An idle runner of the odd model, and its plan."""
    sizes = dataclasses.replace(SIZES, kv_dtype=kv_dtype)
    config, spec, dtype = from_hf(ODD), MeshSpec(tp=tp), np.dtype(dtype)
    mesh = lane_meshes(spec, config.heads, config.kv_heads)[0]
    plan = estimate(config, spec, CPU, Choice(dtype, sizes, 8, numerics))
    buckets = tuple(step.bucket for step in plan.steps)
    return plan, Runner(Model(config, random_weights(config, mesh, dtype), mesh, dtype, numerics), sizes, buckets)


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
@pytest.mark.parametrize("dtype, kv_dtype", [(np.float32, None), (jax.numpy.bfloat16, None), (np.float32, "int8")])
def test_planned_bytes_are_the_bytes_of_the_arrays(tp, dtype, kv_dtype):
    plan, runner = lane(tp, dtype, kv_dtype=kv_dtype)
    assert plan.weights_bytes == shard_bytes(runner.model.weights)
    assert plan.kv_bytes == shard_bytes((runner.state.k, runner.state.v))
    assert plan.state_bytes == shard_bytes((runner.state.history_RS, runner.state.table_RM, runner.draws))


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_what_holds_nothing_new_is_all_that_exceeds_an_even_share(tp):
    plan, _ = lane(tp)
    assert sum(plan.padding.values()) == pytest.approx(plan.weights_bytes - plan.checkpoint_bytes / tp, abs=4)
    assert (plan.padding["kv heads"] > 0) == (tp > 2) and plan.padding["ffn"] > 0 and plan.padding["vocab"] > 0


@pytest.mark.parametrize("tp, numerics", [(1, "fast"), (4, "fast"), (8, "invariant")])
def test_planned_collectives_are_those_of_the_compiled_programs(tp, numerics):
    """Costs two compilations of a tiny model a case."""
    plan, runner = lane(tp, numerics=numerics)
    chosen = {Bucket(2, 2, True, False), Bucket(8, 2, False, True)}
    assert chosen < {step.bucket for step in plan.steps}
    runner.buckets = tuple(chosen)
    runner.warm_up()
    for step in plan.steps:
        if step.bucket in chosen:
            assert by_kind(collectives(runner.programs[step.bucket].text())) == by_kind(step.collectives)


def qwen3(layers):
    """The shape of Qwen3-0.6B with few layers."""
    return ODD | {
        "architectures": ["Qwen3ForCausalLM"],
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "num_hidden_layers": layers,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    }


@pytest.mark.slow
@pytest.mark.parametrize("model, layers", [("embedded", 6), ("embedded", 2), ("qwen3", 2)])
def test_planned_temporaries_are_within_15_percent_of_the_compilers(model, layers):
    """Costs a compilation of 10 to 30 s a case, and no memory: nothing is run."""
    config = from_hf(resolve("embedded").config() if model == "embedded" else qwen3(layers))
    config = dataclasses.replace(config, num_layers=layers, windows=(None,) * layers)
    settings = Settings(max_model_len=min(config.context, 1024))
    plan = estimate(config, MeshSpec(), CPU, decide(settings, config, MeshSpec(), CPU))
    program = compiled(config, MeshSpec(), plan.choice, max(step.bucket for step in plan.steps if step.bucket.full))
    assert plan.temporary_bytes == pytest.approx(program.memory_analysis().temp_size_in_bytes, rel=0.15)


def test_a_pool_that_holds_no_sequence_is_refused_by_the_setting_to_change():
    config = from_hf(ODD)
    with pytest.raises(ConfigError, match=r"kv_memory: .*expected at least 5 blocks.*raise --kv-memory"):
        decide(Settings(kv_memory=1000, max_model_len=64), config, MeshSpec(tp=2), CPU)


def test_a_device_is_known_by_name_and_a_slip_is_answered_with_the_nearest():
    assert device_named("h200").memory_bytes > device_named("h100").memory_bytes
    with pytest.raises(ConfigError, match=r"device: got 'h10'.*did you mean h100\?"):
        device_named("h10")


def test_weights_and_pool_stay_within_the_share_of_a_device():
    config = dataclasses.replace(from_hf(ODD), context=8192)
    device = Device(Target("cuda"), 4_000_000, 1e12)
    plan = estimate(config, MeshSpec(), device, decide(Settings(max_num_seqs=4), config, MeshSpec(), device))
    assert 0.8 < (plan.weights_bytes + plan.kv_bytes) / device.memory_bytes <= 0.85
    assert plan.tokens == (plan.choice.sizes.num_blocks - 1) * 64 and plan.read_s == plan.weights_bytes / 1e12


def test_the_report_says_the_same_to_a_person_and_to_a_program():
    text, lines = io.StringIO(), io.StringIO()
    settings = Settings(mesh="dp=2,tp=4")
    assert run(settings, "h200", None, False, text) == 0 and run(settings, "h200", None, True, lines) == 0
    facts = json.loads(lines.getvalue())
    assert facts["devices"] == 8 and facts["fits"] and len(facts["steps"]) <= 24
    assert f"{facts['weights_bytes']:,}" in text.getvalue() and "2 lanes of 4 devices" in text.getvalue()
    assert facts["steps"][0]["collectives"]["all-reduce"]["calls"] == 2 * 6 + 1 + 3


@pytest.mark.parametrize("name", ["", "config.json"])
def test_a_config_alone_is_enough_to_plan(tmp_path, name):
    (tmp_path / "config.json").write_text(json.dumps(ODD))
    out = io.StringIO()
    assert run(Settings(model=str(tmp_path / name), mesh="tp=4"), "cpu", None, True, out) == 0
    facts = json.loads(out.getvalue())
    assert facts["model"] == tmp_path.name and facts["revision"] is None and facts["weights_bytes"] > 0


def test_the_command_plans_for_a_device_that_is_not_here(capsys):
    assert main(["plan", "embedded", "--mesh", "tp=8", "--device", "h200", "--memory-bytes", "1GB", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["memory_bytes"] == 10**9 and facts["platform"] == "cuda" and facts["devices"] == 8
    assert main(["plan", "embedded", "--device", "h10"]) == 2
    assert "did you mean h100?" in capsys.readouterr().err


def test_a_plan_that_does_not_fit_says_so_and_fails():
    out = io.StringIO()
    settings = Settings(mesh="1", kv_memory=300_000_000)
    assert run(settings, "h200", 100_000_000, False, out) == 1
    assert "DOES NOT FIT" in out.getvalue()
