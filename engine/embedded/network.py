"""Computes the embedded model: one full-sequence Qwen3 forward in plain jnp, and its loss.

    tokens -> embedding -> L x [ norm -> q, k, v -> q norm, k norm -> RoPE -> causal attention -> +,
                              norm -> SwiGLU -> + ] -> norm -> logits over the tied embedding

Weights are a flat dict with the names and the [out, in] layout of a Hugging Face checkpoint.
Cost: about 6 x parameters operations per trained token, plus attention.
Source: `modeling_qwen3.py` of Hugging Face transformers.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

Weights = dict[str, jax.Array]
Project = Callable[[jax.Array, jax.Array], jax.Array]
QUERY_TILE = 64


@dataclass(frozen=True)
class Shape:
    """The sizes of the network, named as the letters of the house: L, V, D, F, N, K, H."""

    num_layers: int = 6
    vocab_size: int = 4096
    width: int = 256
    ffn_width: int = 640
    num_query_heads: int = 8
    num_kv_heads: int = 2
    head_width: int = 32
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6
    max_positions: int = 2048


def weight_shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Name and shape of every weight, in the order of the layers."""
    width, ffn, head = shape.width, shape.ffn_width, shape.head_width
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape.vocab_size, width)}
    for layer in range(shape.num_layers):
        prefix = f"model.layers.{layer}"
        shapes |= {
            f"{prefix}.input_layernorm.weight": (width,),
            f"{prefix}.self_attn.q_proj.weight": (shape.num_query_heads * head, width),
            f"{prefix}.self_attn.k_proj.weight": (shape.num_kv_heads * head, width),
            f"{prefix}.self_attn.v_proj.weight": (shape.num_kv_heads * head, width),
            f"{prefix}.self_attn.q_norm.weight": (head,),
            f"{prefix}.self_attn.k_norm.weight": (head,),
            f"{prefix}.self_attn.o_proj.weight": (width, shape.num_query_heads * head),
            f"{prefix}.post_attention_layernorm.weight": (width,),
            f"{prefix}.mlp.gate_proj.weight": (ffn, width),
            f"{prefix}.mlp.up_proj.weight": (ffn, width),
            f"{prefix}.mlp.down_proj.weight": (width, ffn),
        }
    return shapes | {"model.norm.weight": (width,)}


def initial_weights(shape: Shape, seed: int) -> Weights:
    """Float32 weights: norms at one, matrices normal at 0.02, those that write to the residual smaller."""
    rng = np.random.default_rng(seed)
    weights = {}
    for name, dims in weight_shapes(shape).items():
        writes_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
        scale = 0.02 / (2 * shape.num_layers) ** 0.5 if writes_residual else 0.02
        value = np.ones(dims) if len(dims) == 1 else rng.normal(0.0, scale, dims)
        weights[name] = jnp.asarray(value, jnp.float32)
    return weights


def project_float32(x_TD: jax.Array, w_FD: jax.Array) -> jax.Array:
    """x @ w.T in float32."""
    return jax.lax.dot_general(x_TD, w_FD, (((1,), (1,)), ((), ())))


@jax.custom_vjp
def project_bfloat16(x_TD: jax.Array, w_FD: jax.Array) -> jax.Array:
    """x @ w.T with bfloat16 operands and float32 sums, forward and backward alike."""
    return _dot(x_TD, w_FD, 1, 1)


def _dot(left: jax.Array, right: jax.Array, left_axis: int, right_axis: int) -> jax.Array:
    operands = (left.astype(jnp.bfloat16), right.astype(jnp.bfloat16))
    axes = (((left_axis,), (right_axis,)), ((), ()))
    return jax.lax.dot_general(*operands, axes, preferred_element_type=jnp.float32)


def _project_forward(x_TD: jax.Array, w_FD: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    x_TD, w_FD = x_TD.astype(jnp.bfloat16), w_FD.astype(jnp.bfloat16)
    return _dot(x_TD, w_FD, 1, 1), (x_TD, w_FD)


def _project_backward(saved: tuple[jax.Array, jax.Array], grad_TF: jax.Array) -> tuple[jax.Array, jax.Array]:
    # Left alone, JAX multiplies the float32 cotangent, which is half as fast on a CPU with bfloat16 units.
    x_TD, w_FD = saved
    return _dot(grad_TF, w_FD, 1, 0), _dot(grad_TF, x_TD, 0, 0)


project_bfloat16.defvjp(_project_forward, _project_backward)


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """Root-mean-square norm over the last axis."""
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps) * scale


def rotate(x_BSNH: jax.Array, theta: float) -> jax.Array:
    """RoPE in the rotate-half form, positions counted from 0."""
    length, half = x_BSNH.shape[1], x_BSNH.shape[3] // 2
    angles = np.arange(length)[:, None] * theta ** (-np.arange(half) / half)[None, :]
    cos, sin = (jnp.asarray(f(angles), jnp.float32)[None, :, None, :] for f in (np.cos, np.sin))
    low, high = x_BSNH[..., :half], x_BSNH[..., half:]
    return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)


def causal_attention(q_BSNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array) -> jax.Array:
    """Grouped causal attention of normed queries and keys, [B, S, N, H].

    Each tile of queries meets only the positions that it may see. No maximum is subtracted before the
    exponential: the norms bound a score by sqrt(H) times their gains, far below float32's limit, and the pass over
    the scores is dear.
    """
    batch, length, num_heads, head = q_BSNH.shape
    num_kv = k_BSKH.shape[2]
    group = num_heads // num_kv
    # One matrix product per kv head: its G query heads share the rows of a tile.
    q_RGSH = (q_BSNH * head**-0.5).transpose(0, 2, 1, 3).reshape(batch * num_kv, group, length, head)
    k_RSH, v_RSH = (y.transpose(0, 2, 1, 3).reshape(batch * num_kv, length, head) for y in (k_BSKH, v_BSKH))
    tiles = []
    for start in range(0, length, QUERY_TILE):
        end = min(start + QUERY_TILE, length)
        q_RtH = q_RGSH[:, :, start:end].reshape(batch * num_kv, -1, head)
        visible = np.tile(np.arange(start, end)[:, None] >= np.arange(end)[None, :], (group, 1))
        scores_RtS = jnp.einsum("rth,rsh->rts", q_RtH, k_RSH[:, :end])
        weights_RtS = jnp.exp(jnp.where(visible, scores_RtS, -1e30))
        out_RtH = jnp.einsum("rts,rsh->rth", weights_RtS, v_RSH[:, :end])
        out_RtH = out_RtH / jnp.sum(weights_RtS, axis=-1, keepdims=True)
        tiles.append(out_RtH.reshape(batch * num_kv, group, end - start, head))
    out_BNSH = jnp.concatenate(tiles, axis=2).reshape(batch, num_heads, length, head)
    return out_BNSH.transpose(0, 2, 1, 3)


def hidden_states(weights: Weights, tokens_BS: jax.Array, shape: Shape, project: Project) -> jax.Array:
    """The normed residual after the last layer, [B * S, D] float32; `project` is one of the two products above."""
    batch, length = tokens_BS.shape
    x_TD = weights["model.embed_tokens.weight"][tokens_BS.reshape(-1)]

    def heads(y_TD: jax.Array, name: str) -> jax.Array:
        return project(y_TD, weights[f"{name}.weight"]).reshape(batch, length, -1, shape.head_width)

    for layer in range(shape.num_layers):
        prefix = f"model.layers.{layer}"
        attn, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
        y_TD = rms_norm(x_TD, weights[f"{prefix}.input_layernorm.weight"], shape.norm_eps)
        q_BSNH = rms_norm(heads(y_TD, f"{attn}.q_proj"), weights[f"{attn}.q_norm.weight"], shape.norm_eps)
        k_BSKH = rms_norm(heads(y_TD, f"{attn}.k_proj"), weights[f"{attn}.k_norm.weight"], shape.norm_eps)
        q_BSNH, k_BSKH = rotate(q_BSNH, shape.rope_theta), rotate(k_BSKH, shape.rope_theta)
        out_BSNH = causal_attention(q_BSNH, k_BSKH, heads(y_TD, f"{attn}.v_proj"))
        x_TD = x_TD + project(out_BSNH.reshape(batch * length, -1), weights[f"{attn}.o_proj.weight"])
        y_TD = rms_norm(x_TD, weights[f"{prefix}.post_attention_layernorm.weight"], shape.norm_eps)
        gate_TF = jax.nn.silu(project(y_TD, weights[f"{mlp}.gate_proj.weight"]))
        up_TF = project(y_TD, weights[f"{mlp}.up_proj.weight"])
        x_TD = x_TD + project(gate_TF * up_TF, weights[f"{mlp}.down_proj.weight"])
    return rms_norm(x_TD, weights["model.norm.weight"], shape.norm_eps)


def logits(weights: Weights, tokens_BS: jax.Array, shape: Shape, project: Project) -> jax.Array:
    """Next-token scores, [B, S, V] float32."""
    x_TD = hidden_states(weights, tokens_BS, shape, project)
    return project(x_TD, weights["model.embed_tokens.weight"]).reshape(*tokens_BS.shape, -1)


def mean_loss(weights: Weights, windows_BS: jax.Array, shape: Shape, project: Project) -> jax.Array:
    """Mean cross-entropy, in nats, of each window's tokens after the first."""
    scores_BSV = logits(weights, windows_BS[:, :-1], shape, project)
    is_next_BSV = windows_BS[:, 1:, None] == jnp.arange(scores_BSV.shape[-1])
    # A masked sum, because the gather's gradient would be a slow scatter over all of the logits.
    chosen_BS = jnp.sum(jnp.where(is_next_BSV, scores_BSV, 0.0), axis=-1)
    return jnp.mean(jax.nn.logsumexp(scores_BSV, axis=-1) - chosen_BS)
