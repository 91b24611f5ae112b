"""The decoder of every dense family: tokens in, normed hidden states and filled KV blocks out.

    embed -> [ norm -> qkv (+bias) -> qk-norm -> RoPE -> write KV -> attention -> out (+bias) -> add
               norm -> gate, up -> silu(gate) * up -> down -> add ] x layers -> norm -> (head)

Functions named *_local run inside one `jax.shard_map` over mesh axes ('kv', 'rep') with check_vma=False: a device
holds N / tp query heads, K / kv key/value heads, an equal part of ffn and vocabulary, and all of every token's
hidden state. Per layer two all-reduces of [T, D]; one more for the embedding; none where tp is 1.

Layers are unrolled, one array per layer and matrix: a scan over stacked weights copies them. In 'fast' mode no
weight is sliced, transposed or converted here. Norms and softmax are float32, everything else is in the dtype of
the weights; values are rounded where transformers rounds them.
Source: the module structure of transformers' Llama, Mistral, Qwen2 and Qwen3.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from engine.models.config import ModelConfig
from engine.models.norm import rms_norm
from engine.models.project import Method, column_parallel, mesh_size, row_parallel, shard_index
from engine.models.rope import angles, turn
from pallas_kernels.dispatch import CPU, Numerics, Rows, Target, attention, write_kv
from pallas_kernels.pools import Pool, geometry
from sharding.rules import TP

Weights = Mapping[str, jax.Array]


@dataclass(frozen=True, slots=True)
class Step:
    """What all layers of one step share; arrays are the same for every layer."""

    config: ModelConfig
    how: Method
    rows: Rows
    slots_T: jax.Array  # blocks within layer 0; negative drops the token
    offsets_T: jax.Array
    cos_TH: jax.Array
    sin_TH: jax.Array
    num_blocks: int
    one_token: bool

    def slots_of(self, layer: int, num_slots: int) -> jax.Array:
        """Where the tokens' keys go in the pool of all layers; dropped ones point past its end."""
        return jnp.where(self.slots_T < 0, num_slots, self.slots_T + layer * self.num_blocks)


def forward_local(
    config: ModelConfig,
    weights: Mapping,
    k: Pool,
    v: Pool,
    tokens_T: jax.Array,
    positions_T: jax.Array,
    rows: Rows,
    slots_T: jax.Array,
    num_blocks: int,
    numerics: Numerics,
    one_token: bool,
    target: Target = CPU,
) -> tuple[jax.Array, Pool, Pool]:
    """Hidden states after the final norm [T, D], and both pools with the step's keys and values written.

    slots_T     block of each token as layer 0 counts; negative: the token's keys and values are dropped
    num_blocks  blocks of one layer: layer l of block b is entry l * num_blocks + b of the pools
    target      `pallas_kernels.dispatch.target_of` the mesh's devices
    Raises ValueError, before tracing, where `numerics` cannot hold on this mesh.
    """
    how = Method(numerics, target)
    how.check(mesh_size())
    cos_TH, sin_TH = angles(config.rope, config.head_width, positions_T)
    offsets_T = positions_T % geometry(k)[2]
    step = Step(config, how, rows, slots_T, offsets_T, cos_TH, sin_TH, num_blocks, one_token)
    x_TD = embed_local(weights, tokens_T)
    for layer, layer_weights in enumerate(weights["layers"]):
        with jax.named_scope(f"layer{layer}"):
            y_TD, k, v = _attend(step, layer, layer_weights, x_TD, k, v)
            x_TD = x_TD + y_TD
            x_TD = x_TD + _feed_forward(step, layer_weights, x_TD)
    return rms_norm(x_TD, weights["final_norm_D"], config.norm_eps, numerics), k, v


def logits_local(
    config: ModelConfig, weights: Mapping, x_BD: jax.Array, numerics: Numerics, target: Target = CPU
) -> jax.Array:
    """Logits of this shard's part of the vocabulary; float32 [B, V / tp], -inf for ids that only pad it."""
    head_DV = weights["head_DV"]
    tp, local = mesh_size(), head_DV.shape[1]
    logits_BV = column_parallel(x_BD, head_DV, [(local, local * tp)], Method(numerics, target))
    if local * tp == config.vocab:
        return logits_BV
    id_V = shard_index() * local + jnp.arange(local)
    return jnp.where(id_V < config.vocab, logits_BV, -jnp.inf)


def embed_local(weights: Mapping, tokens_T: jax.Array) -> jax.Array:
    """Embeddings [T, D]: each device gives its own ids and zeros for the others, so their sum is exact."""
    tied = "embed_VD" not in weights
    table = weights["head_DV"] if tied else weights["embed_VD"]
    local = table.shape[1 if tied else 0]
    index_T = tokens_T - shard_index() * local
    inside_T = (index_T >= 0) & (index_T < local)
    index_T = jnp.clip(index_T, 0, local - 1)
    x_TD = table.T[index_T] if tied else table[index_T]
    if mesh_size() == 1:
        return x_TD
    return lax.psum(jnp.where(inside_T[:, None], x_TD, jnp.zeros((), x_TD.dtype)), TP)


def _attend(
    step: Step, layer: int, weights: Weights, x_TD: jax.Array, k: Pool, v: Pool
) -> tuple[jax.Array, Pool, Pool]:
    """What attention adds to the hidden state, and the pools with this layer's keys and values."""
    config, T = step.config, x_TD.shape[0]
    x_TD = rms_norm(x_TD, weights["norms_2D"][0], config.norm_eps, step.how.numerics)
    q_TNH, k_TKH, v_TKH = _heads(step, weights, x_TD)
    slots_T = step.slots_of(layer, geometry(k)[0])
    k, v = write_kv(k, v, k_TKH, v_TKH, slots_T, step.offsets_T)
    o_TNH = attention(
        q_TNH,
        k,
        v,
        step.rows,
        base=layer * step.num_blocks,
        scale=config.head_width**-0.5,
        window=config.windows[layer],
        numerics=step.how.numerics,
        one_token=step.one_token,
        target=step.how.target,
    )
    y_TD = row_parallel(o_TNH.reshape(T, -1), weights["wo_XD"], config.heads * config.head_width, step.how)
    return y_TD + weights["bo_D"] if config.o_bias else y_TD, k, v


def _heads(step: Step, weights: Weights, x_TD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries, keys and values of this shard's heads, queries and keys normed and turned."""
    config, (T, _), H = step.config, x_TD.shape, step.config.head_width
    N, K = config.heads // mesh_size(), config.kv_heads // lax.axis_size("kv")
    parts = [(N * H, config.heads * H), (K * H, config.kv_heads * H), (K * H, config.kv_heads * H)]
    y_TX = column_parallel(x_TD, weights["wqkv_DX"], parts, step.how)
    if config.qkv_bias:
        y_TX = y_TX + weights["bqkv_X"].astype(y_TX.dtype)
    y_TNH = y_TX.astype(x_TD.dtype).reshape(T, -1, H)
    q_TNH, k_TKH, v_TKH = jnp.split(y_TNH, [N, N + K], axis=1)
    if config.qk_norm:
        q_TNH = rms_norm(q_TNH, weights["qk_norms_2H"][0], config.norm_eps, step.how.numerics)
        k_TKH = rms_norm(k_TKH, weights["qk_norms_2H"][1], config.norm_eps, step.how.numerics)
    return turn(q_TNH, step.cos_TH, step.sin_TH), turn(k_TKH, step.cos_TH, step.sin_TH), v_TKH


def _feed_forward(step: Step, weights: Weights, x_TD: jax.Array) -> jax.Array:
    """What the gated MLP adds to the hidden state. The padding of F is zero and adds nothing."""
    x_TD = rms_norm(x_TD, weights["norms_2D"][1], step.config.norm_eps, step.how.numerics)
    local = weights["wd_FD"].shape[0]
    logical = local * mesh_size()
    y_TX = column_parallel(x_TD, weights["wgu_DX"], [(local, logical), (local, logical)], step.how)
    if step.config.mlp_bias:
        y_TX = y_TX + weights["bgu_X"].astype(y_TX.dtype)
    gate_TF, up_TF = jnp.split(y_TX.astype(x_TD.dtype), 2, axis=1)
    hidden_TF = jax.nn.silu(gate_TF.astype(jnp.float32)).astype(x_TD.dtype) * up_TF
    y_TD = row_parallel(hidden_TF, weights["wd_FD"], logical, step.how)
    return y_TD + weights["bd_D"] if step.config.mlp_bias else y_TD
