"""The decoder gives the same on every mesh: nearly in 'fast' mode, to the bit in 'invariant' mode."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from engine.models.config import from_hf
from engine.models.decoder import embed_local
from pallas_kernels.dispatch import Rows

ODD = {
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 97,
    "intermediate_size": 203,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 18,
    "vocab_size": 331,
    "max_position_embeddings": 128,
    "attention_bias": True,
    "use_sliding_window": True,
    "sliding_window": 11,
    "max_window_layers": 1,
}
LENGTH = 21
TOKENS = np.random.default_rng(3).integers(0, ODD["vocab_size"], LENGTH)
OTHERS = np.random.default_rng(4).integers(0, ODD["vocab_size"], 64)


def odd(**keys):
    return from_hf(ODD | keys)


def in_company(lane):
    """Logits of `TOKENS` in row 1 of 3, in uneven chunks beside other rows, the last tokens one by one."""
    logits, done = [], 0
    for chunk, before, after in ((7, 5, 2), (1, 9, 4), (8, 0, 6)):
        pieces = [OTHERS[:before], TOKENS[done : done + chunk], OTHERS[:after]]
        out = lane.step(pieces, [0, done, 0], padded=16, everywhere=True)
        logits.append(out[before : before + chunk])
        done += chunk
    for token in range(done, LENGTH):
        logits.append(lane.step([OTHERS[:1], TOKENS[token : token + 1], []], [9, token, 0])[1:2])
        done += 1
    return np.concatenate(logits)


@pytest.fixture(scope="module")
def alone():
    """Logits of `TOKENS` alone, in one step, on one device; by dtype."""
    return {}


@pytest.mark.parametrize(
    ("dtype", "tp"), [(np.float32, 1), (np.float32, 2), (np.float32, 4), (np.float32, 8), (jnp.bfloat16, 8)]
)
def test_bits_depend_on_no_mesh_no_company_and_no_chunk(lane, alone, dtype, tp):
    config, known = odd(), jnp.dtype(dtype).name
    if known not in alone:
        alone[known] = lane(config, 1, "invariant", dtype=dtype).logits(TOKENS, chunk=24)
    got = in_company(lane(config, tp, "invariant", dtype=dtype, num_rows=3, reach=2))
    assert (got == alone[known]).all()
    assert np.isfinite(got[:, : config.vocab]).all()


@pytest.mark.parametrize("tp", [2, 8])
def test_a_sharded_decoder_equals_one_device(lane, tp):
    config = odd(tie_word_embeddings=True)
    want = lane(config, 1).logits(TOKENS, chunk=24)[:, : config.vocab]
    got = in_company(lane(config, tp, num_rows=3, reach=2))[:, : config.vocab]
    assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()


def test_bfloat16_stays_near_float32(lane):
    config = odd()
    want = lane(config, 1).logits(TOKENS, chunk=24)[:, : config.vocab]
    got = lane(config, 2, dtype=jnp.bfloat16).logits(TOKENS, chunk=24)[:, : config.vocab]
    assert np.abs(got - want).max() <= 0.06 * np.abs(want).max()


def test_padded_tokens_write_nothing(lane):
    some = lane(odd(), 2, num_rows=2, reach=2)
    some.step([TOKENS[:3], []], [0, 0], padded=8)
    written = np.abs(np.asarray(some.pools[0])).max(axis=(1, 3)).reshape(2, some.num_blocks, -1) > 0
    assert written[:, 1, :3].all() and written.sum() == 2 * 3


def test_ids_that_pad_the_vocabulary_can_never_win(lane):
    config = odd()
    logits = lane(config, 4).logits(TOKENS, chunk=24)
    assert logits.shape[1] == 336 and (logits[:, config.vocab :] == -np.inf).all()
    assert np.isfinite(logits[:, : config.vocab]).all()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("tp", [1, 4])
def test_every_id_finds_its_own_embedding(lane, tied, tp):
    some = lane(odd(tie_word_embeddings=tied), tp)
    tables = {name: some.weights[name] for name in ("head_DV", "embed_VD") if name in some.weights}
    specs = {name: table.sharding.spec for name, table in tables.items()}
    embed = jax.shard_map(embed_local, mesh=some.mesh, in_specs=(specs, P()), out_specs=P(), check_vma=False)
    got = jax.jit(embed)(tables, jnp.arange(331))
    table = np.asarray(tables["head_DV"]).T if tied else np.asarray(tables["embed_VD"])
    assert (np.asarray(got) == table[:331]).all()


def test_fast_mode_uses_each_matrix_in_one_product_and_nowhere_else(lane):
    """No slice, transpose or conversion of a weight: any of them would copy it in every step."""
    some, zeros = lane(odd(tie_word_embeddings=False), 1), np.zeros(4, np.int32)
    program = partial(some.program.__wrapped__, one_token=True)
    traced = jax.make_jaxpr(program)(
        some.weights, some.pools, zeros, zeros, Rows(*[zeros] * 3, some.table_BM), *[zeros] * 2
    )
    (sharded,) = [eqn for eqn in traced.eqns if eqn.primitive.name == "shard_map"]
    step, inside = sharded.params["jaxpr"], dict(zip(sharded.invars, sharded.params["jaxpr"].invars, strict=True))
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(some.weights)]
    for name, variable in zip(names, traced.jaxpr.invars, strict=False):
        if any(matrix in name for matrix in ("wqkv", "wo_XD", "wgu", "wd_FD", "head_DV")):
            uses = [eqn.primitive.name for eqn in step.eqns if inside[variable] in eqn.invars]
            assert uses == ["dot_general"], name
