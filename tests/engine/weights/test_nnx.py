import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from engine.errors import ModelError
from engine.weights.load import load
from engine.weights.nnx import from_state
from engine.weights.source import resolve
from sharding.mesh import MeshSpec, lane_meshes

FLOAT32 = np.dtype(np.float32)


class Attention(nnx.Module):
    def __init__(self, c, rngs):
        self.q_proj = nnx.LinearGeneral(c.width, (c.heads, c.head_width), use_bias=False, rngs=rngs)
        self.k_proj = nnx.LinearGeneral(c.width, (c.kv_heads, c.head_width), use_bias=False, rngs=rngs)
        self.v_proj = nnx.LinearGeneral(c.width, (c.kv_heads, c.head_width), use_bias=False, rngs=rngs)
        self.o_proj = nnx.LinearGeneral((c.heads, c.head_width), c.width, axis=(-2, -1), use_bias=False, rngs=rngs)
        self.q_norm = nnx.RMSNorm(c.head_width, rngs=rngs)
        self.k_norm = nnx.RMSNorm(c.head_width, rngs=rngs)


class Mlp(nnx.Module):
    def __init__(self, c, rngs):
        self.gate_proj = nnx.Linear(c.width, c.ffn, use_bias=False, rngs=rngs)
        self.up_proj = nnx.Linear(c.width, c.ffn, use_bias=False, rngs=rngs)
        self.down_proj = nnx.Linear(c.ffn, c.width, use_bias=False, rngs=rngs)


class Layer(nnx.Module):
    def __init__(self, c, rngs):
        self.input_layernorm = nnx.RMSNorm(c.width, rngs=rngs)
        self.self_attn = Attention(c, rngs)
        self.post_attention_layernorm = nnx.RMSNorm(c.width, rngs=rngs)
        self.mlp = Mlp(c, rngs)


class Decoder(nnx.Module):
    def __init__(self, c, rngs):
        self.embed_tokens = nnx.Embed(c.vocab, c.width, rngs=rngs)
        self.layers = nnx.List([Layer(c, rngs) for _ in range(c.num_layers)])
        self.norm = nnx.RMSNorm(c.width, rngs=rngs)


class Qwen3(nnx.Module):
    def __init__(self, c, rngs):
        self.model = Decoder(c, rngs)
        self.lm_head = nnx.Linear(c.width, c.vocab, use_bias=False, rngs=rngs)


class Renamed(nnx.Module):
    """The same weights under other names."""

    def __init__(self, c, rngs):
        self.body = Decoder(c, rngs)
        self.logits = nnx.Linear(c.width, c.vocab, use_bias=False, rngs=rngs)


def as_files(module: Qwen3) -> dict[str, np.ndarray]:
    """The tensors that a Hugging Face export of the module would hold, written out by hand."""
    c = module.model
    files = {
        "model.embed_tokens.weight": c.embed_tokens.embedding[...],
        "model.norm.weight": c.norm.scale[...],
        "lm_head.weight": module.lm_head.kernel[...].T,
    }
    for number, layer in enumerate(c.layers):
        at, attention = f"model.layers.{number}.", layer.self_attn
        files[f"{at}input_layernorm.weight"] = layer.input_layernorm.scale[...]
        files[f"{at}post_attention_layernorm.weight"] = layer.post_attention_layernorm.scale[...]
        for name in "qkv":
            kernel = getattr(attention, f"{name}_proj").kernel[...]
            files[f"{at}self_attn.{name}_proj.weight"] = kernel.reshape(kernel.shape[0], -1).T
        kernel = attention.o_proj.kernel[...]
        files[f"{at}self_attn.o_proj.weight"] = kernel.reshape(-1, kernel.shape[-1]).T
        files[f"{at}self_attn.q_norm.weight"] = attention.q_norm.scale[...]
        files[f"{at}self_attn.k_norm.weight"] = attention.k_norm.scale[...]
        for name in ("gate_proj", "up_proj", "down_proj"):
            files[f"{at}mlp.{name}.weight"] = getattr(layer.mlp, name).kernel[...].T
    return {name: np.ascontiguousarray(value) for name, value in files.items()}


def filled(make) -> nnx.Module:
    """A module whose weights are random, made without running its initialisers."""
    module, random = nnx.eval_shape(make), np.random.default_rng(0)
    state = nnx.state(module, nnx.Param)
    nnx.update(module, jax.tree.map(lambda x: jnp.asarray(random.standard_normal(x.shape), jnp.float32), state))
    return module


@pytest.fixture(scope="module")
def config(folders):
    return folders.config(num_hidden_layers=1)


@pytest.fixture(scope="module")
def trained(config):
    return filled(lambda: Qwen3(config, nnx.Rngs(0)))


@pytest.fixture(scope="module")
def exported(folders, trained, tmp_path_factory):
    return resolve(str(folders.write(tmp_path_factory.mktemp("exported"), as_files(trained), num_hidden_layers=1)))


@pytest.mark.parametrize("tp", [1, 4, 8])
def test_a_trained_module_gives_the_same_weights_as_its_exported_folder(config, trained, exported, tp):
    (mesh,) = lane_meshes(MeshSpec(1, tp), 8, 2)
    wanted = load(exported, config, mesh, FLOAT32)
    for source in (trained, nnx.state(trained, nnx.Param)):
        jax.tree.map(np.testing.assert_array_equal, from_state(source, config, mesh, FLOAT32), wanted)


def test_other_names_are_served_through_a_small_table(config, trained, exported):
    (mesh,) = lane_meshes(MeshSpec(1, 2), 8, 2)
    module = nnx.eval_shape(lambda: Renamed(config, nnx.Rngs(0)))
    module.body, module.logits = trained.model, trained.lm_head
    weights = from_state(
        module, config, mesh, FLOAT32, table={"body": "wrong", "body.{}": "model.{}", "logits": "lm_head"}
    )
    jax.tree.map(np.testing.assert_array_equal, weights, load(exported, config, mesh, FLOAT32))


def test_a_leaf_that_no_tensor_is_named_after_is_refused(config, trained):
    (mesh,) = lane_meshes(MeshSpec(1, 1), 8, 2)
    with_more = nnx.state(trained, nnx.Param)
    with_more["adapter"] = nnx.State({"kernel": nnx.Param(jnp.zeros((4, 4)))})
    with pytest.raises(ModelError, match="adapter.weight: unexpected in the nnx state"):
        from_state(with_more, config, mesh, FLOAT32)


def test_a_missing_leaf_and_a_wrong_shape_are_named(config, trained):
    (mesh,) = lane_meshes(MeshSpec(1, 1), 8, 2)
    state = nnx.state(trained, nnx.Param)
    wide = nnx.from_flat_state(
        (path, variable if path[-2] != "lm_head" else nnx.Param(jnp.zeros((24, 62))))
        for path, variable in nnx.to_flat_state(state)
    )
    with pytest.raises(
        ModelError, match=r"lm_head.weight in the nnx state: got shape \[62, 24\].*wants \[61, 24\]"
    ):
        from_state(wide, config, mesh, FLOAT32)
    less = nnx.from_flat_state(
        (path, variable) for path, variable in nnx.to_flat_state(state) if path[-2] != "q_norm"
    )
    with pytest.raises(ModelError, match=r"self_attn.q_norm.weight: missing"):
        from_state(less, config, mesh, FLOAT32)
