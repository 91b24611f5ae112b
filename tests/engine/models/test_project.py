"""Products with sharded weights equal the plain product; invariant ones to the bit on every mesh."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from engine.models.config import from_hf
from engine.models.project import Method, column_parallel, row_parallel
from pallas_kernels.quantised import dequantise, quantise, split
from pallas_kernels.target import CPU, Target
from sharding.mesh import MeshSpec, lane_meshes
from sharding.rules import TP

WIDTH, COLUMNS = 40, 48


def drawn(rows, dtype):
    rng = np.random.default_rng(5)
    x_TD = rng.normal(size=(64, WIDTH))[:rows]
    w_DX = rng.normal(size=(WIDTH, COLUMNS))
    return jnp.asarray(x_TD, dtype), jnp.asarray(w_DX, dtype)


def product(kind, tp, rows, how, dtype=jnp.float32):
    """x @ w computed over tp devices; w split by its columns or by its rows."""
    (mesh,) = lane_meshes(MeshSpec(1, tp), 8, 2)
    x_TD, w_DX = drawn(rows, dtype)
    if kind == "column":
        local = partial(column_parallel, parts=[(COLUMNS // tp, COLUMNS)], how=how)
        specs, out = (P(), P(None, TP)), P(None, TP)
    else:
        local = partial(row_parallel, logical=WIDTH, how=how)
        specs, out = (P(None, TP), P(TP, None)), P()
    sharded = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False)
    placed = [jax.device_put(a, NamedSharding(mesh, spec)) for a, spec in zip((x_TD, w_DX), specs, strict=True)]
    return np.asarray(jax.jit(sharded)(*placed).astype(jnp.float32))


def plain(rows, dtype=jnp.float32):
    x_TD, w_DX = (np.asarray(array, np.float64) for array in drawn(rows, dtype))
    return x_TD @ w_DX


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
@pytest.mark.parametrize("kind", ["column", "row"])
@pytest.mark.parametrize("tp", [1, 4])
def test_a_fast_product_is_the_plain_one(kind, tp, platform):
    got = product(kind, tp, 5, Method("fast", Target(platform)))
    np.testing.assert_allclose(got, plain(5), atol=2e-5)


@pytest.mark.parametrize("kind", ["column", "row"])
@pytest.mark.parametrize("rows", [1, 2])
def test_a_bfloat16_product_of_few_rows_is_summed_in_float32(kind, rows):
    got = product(kind, 1, rows, Method("fast", CPU), jnp.bfloat16)
    assert got.shape == (rows, COLUMNS)
    np.testing.assert_allclose(got, plain(rows, jnp.bfloat16), rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize("kind", ["column", "row"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_invariant_products_have_the_same_bits_on_every_mesh_and_in_every_batch(kind, dtype):
    how = Method("invariant", CPU)
    want = product(kind, 1, 20, how, dtype)
    np.testing.assert_allclose(want, plain(20, dtype), rtol=2**-8, atol=1e-4)
    for tp in (1, 2, 4, 8):
        for rows in (1, 9):
            assert (product(kind, tp, rows, how, dtype) == want[:rows]).all()


def test_invariant_mode_refuses_a_mesh_that_eighths_do_not_divide():
    for tp in (3, 5, 6, 7, 16):
        with pytest.raises(ValueError, match=f"numerics invariant: got a mesh of {tp}; expected 1, 2, 4 or 8"):
            Method("invariant", CPU).check(tp)
        Method("fast", CPU).check(tp)


GROUPS = 8 * 128  # rows of which 8 devices hold a group each
DECODER = {
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 128,
    "intermediate_size": GROUPS,
    "num_hidden_layers": 1,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "vocab_size": 331,
    "max_position_embeddings": 128,
}
NEAR = {"int8": 0.02, "fp8": 0.1, "int4": 0.4}  # logits to those of the same random weights, of the largest
BY_COLUMNS = ("wqkv_DX", "wgu_DX", "head_DV")
BY_ROWS = ("wo_XD", "wd_FD")


def quantised_product(axis, tp, rows, how, kind, dtype=jnp.float32):
    """x @ w computed over tp devices, and what it stands for; w quantised whole, then split by X or D."""
    (mesh,) = lane_meshes(MeshSpec(1, tp), 8, 2)
    rng = np.random.default_rng(6)
    x_TD = jnp.asarray(rng.normal(size=(32, GROUPS))[:rows], dtype)
    w = quantise(jnp.asarray(rng.normal(size=(GROUPS, COLUMNS)), jnp.float32), kind)
    if axis == "X":
        local = partial(column_parallel, parts=[(COLUMNS // tp, COLUMNS)], how=how)
        specs, out = (P(), split(w, "X", TP)), P(None, TP)
    else:
        local = partial(row_parallel, logical=GROUPS, how=how)
        specs, out = (P(None, TP), split(w, "D", TP)), P()
    placed = jax.device_put((x_TD, w), jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs))
    sharded = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False)
    return np.asarray(jax.jit(sharded)(*placed).astype(jnp.float32)), np.asarray(x_TD, np.float64) @ dequantise(w)


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
@pytest.mark.parametrize("axis", ["X", "D"])
@pytest.mark.parametrize("kind", ["int8", "fp8", "int4"])
def test_a_quantised_product_is_that_of_the_weights_it_stands_for_on_every_mesh(kind, axis, platform):
    for tp, rows in ((1, 3), (2, 1), (4, 12), (8, 3)):
        got, want = quantised_product(axis, tp, rows, Method("fast", Target(platform)), kind)
        np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())
        got, want = quantised_product(axis, tp, rows, Method("fast", Target(platform), dynamic=True), kind)
        off = np.abs(got - want).max() / np.abs(want).max()
        assert 1e-4 < off < (0.05 if kind == "fp8" else 0.02)


@pytest.mark.parametrize("axis", ["X", "D"])
@pytest.mark.parametrize("kind", ["int8", "fp8", "int4"])
def test_invariant_products_of_quantised_weights_have_the_same_bits_on_every_mesh(kind, axis):
    how = Method("invariant", CPU)
    alone, want = quantised_product(axis, 1, 20, how, kind)
    np.testing.assert_allclose(alone, want, atol=1e-5 * np.abs(want).max())
    for tp, rows in ((2, 9), (4, 1), (8, 20)):
        assert (quantised_product(axis, tp, rows, how, kind)[0] == alone[:rows]).all()


def test_invariant_mode_refuses_to_round_tokens():
    Method("fast", CPU, dynamic=True).check(8)
    with pytest.raises(ValueError, match="numerics invariant: a token's scale would depend on the mesh"):
        Method("invariant", CPU, dynamic=True).check(8)


def quantise_lane(lane, kind):
    """Every matrix that meets a product gives way to its quantised form, placed as it was."""
    top = {"head_DV": lane.weights["head_DV"]}
    for weights in (top, *lane.weights["layers"]):
        for name in weights.keys() & {*BY_COLUMNS, *BY_ROWS}:
            w = quantise(jnp.asarray(np.asarray(weights[name])), kind)
            specs = split(w, "X" if name in BY_COLUMNS else "D", TP)
            weights[name] = jax.tree.map(
                lambda a, spec: jax.device_put(a, NamedSharding(lane.mesh, spec)), w, specs
            )
    lane.weights |= top
    lane.program = jax.jit(lane._program(), static_argnames="one_token")
    return lane


@pytest.mark.parametrize("kind", ["int8", "fp8", "int4"])
def test_a_decoder_of_quantised_matrices_gives_nearly_the_same_logits_and_on_two_meshes(lane, kind):
    config, tokens = from_hf(DECODER), np.random.default_rng(3).integers(0, 331, 11)
    plain, one, many = lane(config, 1), *(quantise_lane(lane(config, tp), kind) for tp in (1, 8))
    plain_TV, one_TV, many_TV = (some.logits(tokens, chunk=11)[:, :331] for some in (plain, one, many))
    size = np.abs(plain_TV).max()
    assert 1e-4 < np.abs(one_TV - plain_TV).max() / size < NEAR[kind]
    assert np.abs(many_TV - one_TV).max() < 1e-5 * size


def test_an_invariant_decoder_of_quantised_matrices_has_the_same_bits_on_two_meshes(lane):
    config, tokens = from_hf(DECODER), np.random.default_rng(3).integers(0, 331, 9)
    one, many = (quantise_lane(lane(config, tp, "invariant"), "int4") for tp in (1, 8))
    one_TV = one.logits(tokens, chunk=9)
    assert (one_TV == many.logits(tokens, chunk=9)).all() and np.isfinite(one_TV[:, :331]).all()
