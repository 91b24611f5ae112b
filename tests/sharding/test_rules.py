import jax
import jax.numpy as jnp
import pytest

from sharding.rules import TENSOR, ShardingError, describe, place

MESH = jax.make_mesh((2, 4), ("kv", "rep"))


def test_describe():
    assert describe("DNH", TENSOR) == "D N_kv_rep H"


def test_sharded_equals_unsharded():
    x_TD, w_DF = jax.random.normal(jax.random.key(0), (8, 16)), jax.random.normal(jax.random.key(1), (16, 32))
    f = jax.jit(lambda x_TD, w_DF: jnp.einsum("TD,DF->TF", x_TD, w_DF))
    y_TF = f(
        jax.device_put(x_TD, place("TD", x_TD.shape, TENSOR, MESH)),
        jax.device_put(w_DF, place("DF", w_DF.shape, TENSOR, MESH)),
    )
    assert y_TF.sharding.spec == place("TF", y_TF.shape, TENSOR, MESH).spec
    assert jnp.allclose(y_TF, x_TD @ w_DF, atol=1e-5)


def test_fewer_kv_heads_than_devices_are_replicated():
    sharding = place("DKH", (64, 2, 8), TENSOR, MESH)
    assert sharding.shard_shape((64, 2, 8)) == (64, 1, 8)
    parts = sharding.devices_indices_map((64, 2, 8)).values()
    assert sorted(part[1].start for part in parts) == [0, 0, 0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize(
    "letters, shape, message",
    [
        ("DNH", (64, 12, 8), r"\[D N_kv_rep H\]: N=12 does not split 8 ways"),
        ("NF", (8, 8), r"\[N_kv_rep F_kv_rep\]: N already has mesh axis kv"),
    ],
)
def test_errors_name_the_axis_in_book_notation(letters, shape, message):
    with pytest.raises(ShardingError, match=message):
        place(letters, shape, TENSOR, MESH)
