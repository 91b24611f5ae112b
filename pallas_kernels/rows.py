"""Which tokens of a step belong to which row, and where their keys and values are.

    tokens    0 1 2 3 4 5 6 7 | padding      T = 10, B = 4
    row       0 0 0 1 2 2 2 2 | - -          first [0 3 4 8]   count [3 1 4 0]
    position  5 6 7 0 9 ...                  start [5 0 9 0]

A row's tokens are contiguous, rows stand in order, a row with count 0 is padding. T and B are static.
A pool holds all layers: block b of layer l is index l * P + b, and `base` = l * P is added here.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Rows(NamedTuple):
    """The rows of one step; all int32."""

    first_B: jax.Array  # index in T of the row's first token
    start_B: jax.Array  # position of that token in its sequence
    count_B: jax.Array  # tokens of the row in this step; 0 marks a padded row
    table_BM: jax.Array  # block numbers within one layer; entries past the last position are ignored


class Owners(NamedTuple):
    """The row of each token; padded tokens are not live, and their row and position are 0."""

    row_T: jax.Array
    position_T: jax.Array
    live_T: jax.Array


def owners(rows: Rows, num_tokens: int) -> Owners:
    """Find each token's row. Costs T x B comparisons."""
    token_T = jnp.arange(num_tokens, dtype=jnp.int32)
    after_TB = token_T[:, None] - rows.first_B
    owned_TB = (after_TB >= 0) & (after_TB < rows.count_B)
    live_T = jnp.any(owned_TB, axis=1)
    row_T = jnp.argmax(owned_TB, axis=1).astype(jnp.int32)
    position_T = jnp.where(live_T, rows.start_B[row_T] + token_T - rows.first_B[row_T], 0)
    return Owners(row_T, position_T, live_T)
