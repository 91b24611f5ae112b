"""The noise of a token is the library's, and knows nothing of the width it is made in."""

import jax
import jax.numpy as jnp
import numpy as np

from engine.runner.noise import fold, gumbel


def test_noise_is_that_of_the_library_whatever_the_width():
    key = jax.random.wrap_key_data(jnp.asarray([123, 456], jnp.uint32), impl="threefry2x32")
    key = jax.random.fold_in(jax.random.fold_in(key, 7), 99)
    one = jnp.asarray([1], jnp.uint32)
    high, low = jax.jit(fold)(one * 123, one * 456, jnp.asarray([7]), jnp.asarray([99]))
    assert [int(high[0]), int(low[0])] == np.asarray(jax.random.key_data(key)).tolist()
    u = (np.asarray(jax.random.bits(key, (1000,)), np.float64) + 0.5) * 2.0**-32
    noise = jax.jit(gumbel, static_argnums=2)
    whole = np.asarray(noise(high, low, 1000, 0))[0]
    np.testing.assert_allclose(whole, -np.log(-np.log1p(-u)), rtol=2e-6, atol=2e-6)
    assert np.asarray(noise(high, low, 300, 500))[0].tobytes() == whole[500:800].tobytes()
