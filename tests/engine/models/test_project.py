"""Products with sharded weights equal the plain product; invariant ones to the bit on every mesh."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from engine.models.project import Method, column_parallel, row_parallel
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
