"""One step as one device program: rows in, one token a drawing row out, KV and history written on the way.

    packed int32 [B, 6] -> table and tokens of each row -> decoder -> hidden states at the points -> logits -> draw
                        -> history at the drawn positions, packed result

Everything but the rows of the plan is already on the device; the result is one int32 array, so that one copy brings
it back: TOKEN, FINITE and, from a full step, LOGPROB, RANK, TOP ids, TOP log-probabilities (floats as their bits).
The whole step stands in one `jax.shard_map`.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from engine.core.plan import BLOCK, COUNT, DRAW, ROW, SCORE, START, TOP, StepResult
from engine.models.config import ModelConfig
from engine.models.decoder import forward_local, logits_local
from engine.runner.buckets import Bucket
from engine.runner.draws import Draws, at_points
from engine.runner.sampling import draw_full, draw_plain
from engine.runner.state import STATE, Sizes, State
from pallas_kernels.dispatch import Numerics, Rows, Target, target_of
from pallas_kernels.rows import owners
from sharding.rules import TP

PLAIN_WIDTH = 2
FULL_WIDTH = 4 + 2 * TOP


class Points(NamedTuple):
    """Where logits are wanted: B entries, those at or past the number of points are padding."""

    token_B: jax.Array  # index in T of the token whose hidden state decides
    line_B: jax.Array  # index in the plan
    position_B: jax.Array  # of the token that is drawn or scored
    draws_B: jax.Array  # bool: the drawn token goes into the history
    live_B: jax.Array  # bool


def step_program(
    config: ModelConfig, sizes: Sizes, mesh: Mesh, weight_specs: Mapping, numerics: Numerics
) -> Callable:
    """`build(bucket)` makes a jitted (weights, state, draws, packed) -> (state, result); state is donated."""
    target = target_of(mesh.devices.flat[0])

    def build(bucket: Bucket):
        def local(weights, state: State, draws: Draws, packed_B6):
            return _step_local(config, sizes, bucket, numerics, target, weights, state, draws, packed_B6)

        replicated = PartitionSpec()
        mapped = jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(weight_specs, STATE, replicated, replicated),
            out_specs=(STATE, replicated),
            check_vma=False,
        )
        return jax.jit(mapped, donate_argnums=1)

    return build


def _step_local(
    config: ModelConfig,
    sizes: Sizes,
    bucket: Bucket,
    numerics: Numerics,
    target: Target,
    weights,
    state,
    draws,
    packed_B6,
) -> tuple[State, jax.Array]:
    row_B, start_B, count_B = packed_B6[:, ROW], packed_B6[:, START], packed_B6[:, COUNT]
    table_RM = _new_blocks(state.table_RM, packed_B6, sizes)
    table_BM = table_RM.at[row_B].get(mode="clip")
    rows = Rows(jnp.cumsum(count_B) - count_B, start_B, count_B, table_BM)
    owner = owners(rows, bucket.tokens)
    tokens_T = state.history_RS.at[row_B[owner.row_T], owner.position_T].get(mode="clip")
    slots_T = table_BM[owner.row_T, owner.position_T // sizes.block_size]
    slots_T = jnp.where(owner.live_T, slots_T, -1)
    x_TD, k, v = forward_local(
        config,
        weights,
        state.k,
        state.v,
        tokens_T,
        owner.position_T,
        rows,
        slots_T,
        sizes.num_blocks,
        numerics,
        bucket.one_token,
        target,
    )
    points = _points(packed_B6, rows.first_B, bucket)
    x_BD = x_TD if bucket.one_token else x_TD[points.token_B]
    logits_BV = logits_local(config, weights, x_BD, numerics, target)
    history_RS, result = _draw(config, bucket, state.history_RS, draws, row_B, points, logits_BV)
    return State(k, v, history_RS, table_RM), result


def _new_blocks(table_RM: jax.Array, packed_B6: jax.Array, sizes: Sizes) -> jax.Array:
    """The tables with each row's new block, if it brings one, at its last position."""
    column_B = (packed_B6[:, START] + packed_B6[:, COUNT] - 1) // sizes.block_size
    line_B = jnp.where(packed_B6[:, BLOCK] > 0, packed_B6[:, ROW], sizes.max_rows)
    return table_RM.at[line_B, column_B].set(packed_B6[:, BLOCK], mode="drop")


def _points(packed_B6: jax.Array, first_B: jax.Array, bucket: Bucket) -> Points:
    start_B, count_B = packed_B6[:, START], packed_B6[:, COUNT]
    if bucket.one_token:
        line_B = jnp.arange(bucket.rows)
        draws_B = packed_B6[:, DRAW] > 0
        return Points(line_B, line_B, start_B + 1, draws_B, draws_B)
    points_B = packed_B6[:, SCORE] + packed_B6[:, DRAW]
    ends_B = jnp.cumsum(points_B)
    point_B = jnp.arange(bucket.rows)
    line_B = jnp.minimum(jnp.sum(ends_B[None, :] <= point_B[:, None], axis=1), bucket.rows - 1)
    from_end_B = ends_B[line_B] - point_B  # 1 for a row's last point
    live_B = point_B < ends_B[-1]
    at_B = jnp.where(live_B, count_B[line_B] - from_end_B, 0)
    draws_B = live_B & (from_end_B == 1) & (packed_B6[line_B, DRAW] > 0)
    token_B = jnp.where(live_B, first_B[line_B] + at_B, 0)
    return Points(token_B, line_B, start_B[line_B] + at_B + 1, draws_B, live_B)


def _draw(
    config: ModelConfig, bucket: Bucket, history_RS: jax.Array, draws: Draws, row_B, points: Points, logits_BV
) -> tuple[jax.Array, jax.Array]:
    """The history with the drawn tokens, and the packed result."""
    seat_B = row_B[points.line_B]
    records = at_points(draws, seat_B)
    if bucket.full:
        if lax.axis_size(TP) > 1:
            logits_BV = lax.all_gather(logits_BV, TP, axis=1, tiled=True)
        known_B = history_RS.at[seat_B, points.position_B].get(mode="clip")
        target_B = jnp.where(points.draws_B | ~points.live_B, -1, known_B)
        drawn = draw_full(logits_BV, records, history_RS, seat_B, points.position_B, target_B, vocab=config.vocab)
        tokens_B = drawn.tokens_B
        fields = [drawn.tokens_B, drawn.finite_B, drawn.logprob_B, drawn.rank_B, drawn.top_ids, drawn.top_logprobs]
    else:
        axes = TP if lax.axis_size(TP) > 1 else ()
        tokens_B, finite_B = draw_plain(logits_BV, records, points.position_B, vocab=config.vocab, axes=axes)
        fields = [tokens_B, finite_B]
    line_B = jnp.where(points.draws_B, seat_B, history_RS.shape[0])
    history_RS = history_RS.at[line_B, points.position_B].set(tokens_B, mode="drop")
    return history_RS, jnp.concatenate([_bits(field) for field in fields])


def _bits(field: jax.Array) -> jax.Array:
    """One line of B integers for each column of `field`."""
    field = field[None] if field.ndim == 1 else field.T
    return lax.bitcast_convert_type(field, jnp.int32) if field.dtype == jnp.float32 else field.astype(jnp.int32)


def read_result(step: int, packed: np.ndarray, num_points: int) -> StepResult:
    """The StepResult of a packed result, int32 [PLAIN_WIDTH or FULL_WIDTH, B]."""
    packed = packed[:, :num_points]
    tokens, finite = packed[0], packed[1] > 0
    if len(packed) == PLAIN_WIDTH:
        return StepResult(step, tokens, finite)
    floats = packed.view(np.float32)
    top_ids, top_logprobs = packed[4 : 4 + TOP].T, floats[4 + TOP :].T
    return StepResult(step, tokens, finite, floats[2], packed[3], top_ids, top_logprobs)
