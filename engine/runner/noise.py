"""Noise of a draw: a number that depends on the key and the token id, and on nothing else.

    seed, choice, position --fold twice--> key, 64 bits a point --threefry of (0, id)--> 32 bits --> Gumbel

Because element i knows only the key and i, a shard of the vocabulary makes its own part, and a padding of V changes
no other id. The bits are those of `jax.random.bits` under partitionable threefry; they are computed here with the
rounds unrolled. Cost: 10 ms of one CPU core for [16, 151936]; the library's rolled loop takes five times as long.
Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011); Gumbel-max trick.
"""

import jax
import jax.numpy as jnp
from jax import lax

ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
PARITY = 0x1BD11BDA


def threefry(
    key_high: jax.Array, key_low: jax.Array, high: jax.Array, low: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Threefry-2x32 with 20 rounds of the counter (high, low) under a key; uint32, broadcasting."""
    keys = (key_high, key_low, key_high ^ key_low ^ jnp.uint32(PARITY))
    high, low = high + keys[0], low + keys[1]
    for turn in range(5):
        for rotation in ROTATIONS[turn % 2]:
            high = high + low
            low = (low << jnp.uint32(rotation)) | (low >> jnp.uint32(32 - rotation))
            low = low ^ high
        high, low = high + keys[(turn + 1) % 3], low + keys[(turn + 2) % 3] + jnp.uint32(turn + 1)
    return high, low


def fold(seed_high_B: jax.Array, seed_low_B: jax.Array, choice_B: jax.Array, position_B: jax.Array):
    """Two words of key a point: fold_in(fold_in(key(seed), choice), position)."""
    zero = jnp.zeros_like(seed_low_B)
    high_B, low_B = threefry(seed_high_B, seed_low_B, zero, choice_B.astype(jnp.uint32))
    return threefry(high_B, low_B, zero, position_B.astype(jnp.uint32))


def gumbel(high_B: jax.Array, low_B: jax.Array, num_tokens: int, first: jax.Array | int) -> jax.Array:
    """Standard Gumbel noise, float32 [B, num_tokens], of token ids from `first` on; always finite.

    With u uniform the noise is -log(E), E = -log(1 - u). The winners of a large vocabulary have the smallest E, so
    u keeps all 32 bits near 0 (a float32 has more steps there than near 1), and E comes from its series where
    log(1 - u) would lose them.
    """
    ids_V = (lax.iota(jnp.int32, num_tokens) + first).astype(jnp.uint32)
    high_BV, low_BV = threefry(high_B[:, None], low_B[:, None], jnp.uint32(0), ids_V[None])
    u_BV = (high_BV ^ low_BV).astype(jnp.float32) * 2.0**-32 + 2.0**-33
    u_BV = jnp.minimum(u_BV, 1 - 2.0**-24)
    series_BV = u_BV * (1 + u_BV * (1 / 2 + u_BV * (1 / 3 + u_BV / 4)))
    return -jnp.log(jnp.where(u_BV < 2.0**-6, series_BV, -jnp.log(1 - u_BV)))
