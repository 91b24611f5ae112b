import jax
import numpy as np
import pytest

from engine.models.config import ModelConfig, Rope
from engine.weights.layout import padded, parameters, read_part
from sharding.mesh import MeshSpec, lane_meshes
from sharding.rules import TENSOR, ShardingError, place


def config(**changes) -> ModelConfig:
    sizes = dict(num_layers=2, width=6, ffn=37, heads=8, kv_heads=2, head_width=4, vocab=61, context=64)
    flags = dict(qk_norm=True, qkv_bias=True, o_bias=True, mlp_bias=True, tied=False, windows=(None, None))
    return ModelConfig("Test", norm_eps=1e-6, rope=Rope("default", 1e4), **(sizes | flags | changes))


def tensors(config: ModelConfig) -> dict[str, np.ndarray]:
    """Every tensor of the file, filled with numbers that no other place holds."""
    shapes = {part.name: part.shape for parameter in parameters(config, 1) for part in parameter.parts}
    starts = np.cumsum([0, *(np.prod(shape) for shape in shapes.values())])
    return {
        name: np.arange(start, start + np.prod(shape), dtype=np.float64).reshape(shape)
        for (name, shape), start in zip(shapes.items(), starts, strict=False)
    }


def by_name(config: ModelConfig, tp: int):
    return {parameter.name: parameter for parameter in parameters(config, tp)}


def local(config, tp, name, shard):
    files = tensors(config)
    return read_part(by_name(config, tp)[name], shard, lambda tensor, cut: files[tensor][cut], np.dtype(np.float64))


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_each_shard_holds_its_own_query_heads_and_the_kv_heads_they_use(tp):
    files = tensors(config())
    q_NHD, k_KHD, v_KHD = (files[f"model.layers.1.self_attn.{n}_proj.weight"].reshape(-1, 4, 6) for n in "qkv")
    for shard in range(tp):
        heads = range(8)[shard * 8 // tp : (shard + 1) * 8 // tp]
        kv_heads = sorted({head * 2 // 8 for head in heads})
        wanted = (
            [q_NHD[head] for head in heads]
            + [k_KHD[head] for head in kv_heads]
            + [v_KHD[head] for head in kv_heads]
        )
        np.testing.assert_array_equal(local(config(), tp, "layers.1.wqkv_DX", shard), np.concatenate(wanted).T)


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_an_odd_ffn_width_is_padded_with_zeros_past_its_end(tp):
    files, width = tensors(config()), padded(37, tp)
    gate_FD, up_FD = (files[f"model.layers.0.mlp.{name}_proj.weight"] for name in ("gate", "up"))
    down_DF = files["model.layers.0.mlp.down_proj.weight"]
    shards = [local(config(), tp, "layers.0.wgu_DX", shard).reshape(6, 2, width // tp) for shard in range(tp)]
    gate_up_D2F = np.concatenate(shards, axis=2)
    np.testing.assert_array_equal(gate_up_D2F[:, 0, :37], gate_FD.T)
    np.testing.assert_array_equal(gate_up_D2F[:, 1, :37], up_FD.T)
    wd_FD = np.concatenate([local(config(), tp, "layers.0.wd_FD", shard) for shard in range(tp)])
    np.testing.assert_array_equal(wd_FD[:37], down_DF.T)
    assert not gate_up_D2F[:, :, 37:].any() and not wd_FD[37:].any()


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
@pytest.mark.parametrize("tied", [True, False])
def test_the_vocabulary_is_split_and_padded_and_a_tied_head_is_the_embedding(tp, tied):
    model = config(tied=tied)
    files = tensors(model)
    head_DV = np.concatenate([local(model, tp, "head_DV", shard) for shard in range(tp)], axis=1)
    source = "model.embed_tokens.weight" if tied else "lm_head.weight"
    np.testing.assert_array_equal(head_DV[:, :61], files[source].T)
    assert head_DV.shape == (6, 64) and not head_DV[:, 61:].any()
    assert ("embed_VD" in by_name(model, tp)) is not tied
    assert ("lm_head.weight" in files) is not tied


def test_a_part_that_is_all_padding_reads_nothing():
    model, asked = config(vocab=9), []
    read_part(by_name(model, 8)["head_DV"], 7, lambda *call: asked.append(call), np.dtype(np.float32))
    assert asked == []


def test_norms_are_stacked_and_biases_follow_their_columns():
    files = tensors(config())
    at = "model.layers.1."
    norms = [files[f"{at}{name}_layernorm.weight"] for name in ("input", "post_attention")]
    np.testing.assert_array_equal(local(config(), 4, "layers.1.norms_2D", 3), np.stack(norms))
    q, k, v = (files[f"{at}self_attn.{name}_proj.bias"] for name in "qkv")
    np.testing.assert_array_equal(
        local(config(), 8, "layers.1.bqkv_X", 5), np.concatenate([q[20:24], k[4:], v[4:]])
    )
    np.testing.assert_array_equal(local(config(), 8, "layers.1.bo_D", 5), files[f"{at}self_attn.o_proj.bias"])


def test_flags_decide_which_arrays_there_are():
    plain = by_name(config(qk_norm=False, qkv_bias=False, o_bias=False, mlp_bias=False, tied=True, num_layers=1), 2)
    layer = ["norms_2D", "wqkv_DX", "wo_XD", "wgu_DX", "wd_FD"]
    assert list(plain) == ["head_DV", "final_norm_D", *(f"layers.0.{name}" for name in layer)]


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_every_array_splits_over_its_mesh_as_its_letters_say(tp):
    (mesh,) = lane_meshes(MeshSpec(1, tp), 8, 2)
    for parameter in parameters(config(), tp):
        sharding = place(parameter.letters, parameter.shape, TENSOR, mesh)
        assert sharding.shard_shape(parameter.shape) == parameter.local_shape
        wanted = {device: shard for shard, device in enumerate(mesh.devices.flat)}
        for device, index in sharding.devices_indices_map(parameter.shape).items():
            assert parameter.shard(index) == (0 if parameter.axis is None else wanted[device])


def test_heads_that_do_not_split_are_refused_before_anything_is_read():
    with pytest.raises(ShardingError, match="valid tp sizes are 1, 2, 4, 8"):
        parameters(config(), 3)


def test_widths_are_padded_to_whole_eighths_on_every_mesh():
    assert [padded(61, tp) for tp in (1, 2, 4, 8, 16, 12)] == [64, 64, 64, 64, 64, 72]
    assert jax.device_count() == 8
