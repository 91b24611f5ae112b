"""From logits to a token: the draw of every point of a step, as pure functions on the device.

    raw logits -> log-probabilities reported -> min_tokens mask -> logit_bias -> repetition, frequency, presence
               -> temperature (0: the best, lowest id of equals) -> min_p -> top_k -> top_p -> best of logit + noise

`draw_plain` serves steps in which every draw is greedy or pure temperature: logits stay sharded over the vocabulary
and only maxima cross the mesh. `draw_full` does everything, on gathered logits. Both make the same bits for a row
that both can serve, and what a row draws depends on its own record, logits, history and position alone.
Nothing is clamped. A row with a NaN or infinity among its logits gets token 0 and finite False.
Cost for 16 points of 151,936 tokens, in milliseconds of one CPU core: greedy 3; temperature 14, 10 of them noise;
log-probabilities 9 more, bias 2, penalties 4, top_k 13, top_p 50. That is with an allocator that keeps its memory;
one that returns it after every step adds 5 to 50 in page faults (glibc: arena_max 1, mmap_max 0, no trimming).
Source: order and formulas of vLLM's sampler; Gumbel-max for the draw.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from engine.core.plan import TOP
from engine.runner.draws import Draws
from engine.runner.filters import kept
from engine.runner.noise import fold, gumbel
from pallas_kernels.numerics import tree_sum

PARTS = 128  # of a row, in the search for its best
HISTORY_TILE = 1024  # tokens of history counted at a time, up to the longest in the step


class Drawn(NamedTuple):
    """One entry a point, as in core/plan.py's StepResult. Zeros where a row asked for no log-probabilities."""

    tokens_B: jax.Array  # int32
    finite_B: jax.Array  # bool
    logprob_B: jax.Array  # float32
    rank_B: jax.Array  # int32
    top_ids: jax.Array  # int32 [B, TOP]; -1 past the end of a small vocabulary
    top_logprobs: jax.Array  # float32 [B, TOP]


def _whole(x_BV: jax.Array, ids_V: jax.Array, vocab: int) -> tuple[jax.Array, jax.Array]:
    """Logits with padding at -inf, and whether a row holds neither NaN nor infinity."""
    real_V = ids_V < vocab
    return jnp.where(real_V, x_BV, -jnp.inf), ~jnp.any(real_V & ~jnp.isfinite(x_BV), 1)


def _best(z_BV: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The greatest of each row and its lowest place; found in two levels (0.4 ms for [16, 151936], argmax 20)."""
    num_points, width = z_BV.shape
    parts = math.gcd(width, PARTS)
    z_BPv = z_BV.reshape(num_points, parts, width // parts)
    best_BP = jnp.max(z_BPv, 2)
    best_B = jnp.max(best_BP, 1)
    part_B = jnp.min(jnp.where(best_BP == best_B[:, None], lax.iota(jnp.int32, parts), parts - 1), 1)
    part_Bv = jnp.take_along_axis(z_BPv, part_B[:, None, None], 1)[:, 0]
    place_B = jnp.min(
        jnp.where(part_Bv == best_B[:, None], lax.iota(jnp.int32, width // parts), width // parts - 1), 1
    )
    return best_B, part_B * (width // parts) + place_B


def _pick(
    x_BV: jax.Array, most_B: jax.Array, draws: Draws, position_B: jax.Array, first: jax.Array | int
) -> tuple[jax.Array, jax.Array]:
    """The winning value of each row and its place: of logits if greedy, else of (x - max) / temperature + noise.

    The maximum goes first, so that no temperature is too small: far logits become -inf, never the best.
    """
    hot_B = draws.temperature_R > 0

    def noised(x_BV):
        high_B, low_B = fold(draws.seed_high_R, draws.seed_low_R, draws.choice_R, position_B)
        degrees_B = jnp.where(hot_B, draws.temperature_R, 1.0)
        noise_BV = gumbel(high_B, low_B, x_BV.shape[1], first)
        return _best(jnp.where(hot_B[:, None], (x_BV - most_B[:, None]) / degrees_B[:, None] + noise_BV, x_BV))

    return lax.cond(jnp.any(hot_B), noised, _best, x_BV)


def draw_plain(
    logits_BV: jax.Array, draws: Draws, position_B: jax.Array, *, vocab: int, axes: tuple[str, ...] = ()
) -> tuple[jax.Array, jax.Array]:
    """Draw for points whose records are `Draw.plain`: tokens int32 [B] and finite bool [B].

    logits_BV   float32, this shard's part of the padded vocabulary; ids at or past `vocab` are padding
    draws       records of the points
    position_B  index in the whole sequence of the token that is drawn
    axes        mesh axes that shard the vocabulary, inside shard_map; the results are the same on all of them
    """
    width = logits_BV.shape[1]
    first = lax.axis_index(axes) * width if axes else 0
    ids_V = lax.iota(jnp.int32, width) + first
    x_BV, finite_B = _whole(logits_BV, ids_V, vocab)
    most_B = jnp.where(finite_B, jnp.max(x_BV, 1), 0.0)
    if axes:
        finite_B = lax.pmin(finite_B.astype(jnp.int32), axes) > 0
        most_B = lax.pmax(most_B, axes)
    best_B, place_B = _pick(x_BV, most_B, draws, position_B, first)
    token_B = place_B + first
    if axes:
        token_B = lax.pmin(jnp.where(best_B == lax.pmax(best_B, axes), token_B, vocab), axes)
    return jnp.where(finite_B, token_B, 0), finite_B


def draw_full(
    logits_BV: jax.Array,
    draws: Draws,
    history_RS: jax.Array,
    row_B: jax.Array,
    position_B: jax.Array,
    target_B: jax.Array,
    *,
    vocab: int,
) -> Drawn:
    """Draw, or score a given token, with every parameter; exact over the whole vocabulary.

    logits_BV   float32, the whole padded vocabulary; ids at or past `vocab` are padding
    draws       records of the points
    history_RS  int32, the tokens of every row of the lane; row_B says which row a point stands in
    position_B  index in the whole sequence of the token that is drawn or scored: history before it is read
    target_B    -1 to draw; a token id to score that one under the raw logits
    """
    raw_BV, finite_B = _whole(logits_BV, lax.iota(jnp.int32, logits_BV.shape[1]), vocab)
    shaped_B = _bias_wanted(draws, position_B, vocab) | _penalty_wanted(draws) | _filter_wanted(draws)

    def simple(x_BV):
        most_B = jnp.max(x_BV, 1)
        return _pick(x_BV, most_B, draws, position_B, 0)[1], most_B

    def shaped(x_BV):
        x_BV = _penalised(_biased(x_BV, draws, position_B), draws, history_RS, row_B, position_B)
        most_B = jnp.max(x_BV, 1)
        return _pick(_filtered(x_BV, most_B, draws), most_B, draws, position_B, 0)[1], most_B

    token_B, most_B = lax.cond(jnp.any(shaped_B), shaped, simple, raw_BV)
    drawing_B = target_B < 0
    # no number is left to draw from when every token is barred, or a penalty overflows
    finite_B = finite_B & (jnp.isfinite(most_B) | ~drawing_B)
    token_B = jnp.where(drawing_B, jnp.where(finite_B, token_B, 0), target_B)
    wanted_B = finite_B & (~drawing_B | (draws.logprobs_R >= 0))
    return Drawn(token_B, finite_B, *_reported(raw_BV, token_B, wanted_B))


def _bias_wanted(draws: Draws, position_B: jax.Array, vocab: int) -> jax.Array:
    return (position_B < draws.masked_until_R) | (draws.bias_ids[:, 0] < vocab)


def _penalty_wanted(draws: Draws) -> jax.Array:
    return (draws.repetition_R != 1) | (draws.frequency_R != 0) | (draws.presence_R != 0)


def _filter_wanted(draws: Draws) -> jax.Array:
    return (draws.temperature_R > 0) & ((draws.top_k_R > 0) | (draws.top_p_R < 1) | (draws.min_p_R > 0))


def _biased(x_BV: jax.Array, draws: Draws, position_B: jax.Array) -> jax.Array:
    """Stop ids at -inf while the sequence is too short, then logit_bias added."""
    num_points, num_tokens = x_BV.shape
    lines = jnp.arange(num_points)[:, None]

    def biased(x_BV):
        short_B1 = (position_B < draws.masked_until_R)[:, None]
        stop_ids = jnp.where(short_B1, draws.stop_ids, num_tokens)
        x_BV = x_BV.at[lines, stop_ids].set(-jnp.inf, mode="drop")
        return x_BV.at[lines, draws.bias_ids].add(draws.bias_values, mode="drop")

    return lax.cond(jnp.any(_bias_wanted(draws, position_B, num_tokens)), biased, lambda x_BV: x_BV, x_BV)


def _counts(
    draws: Draws, history_RS: jax.Array, row_B: jax.Array, position_B: jax.Array, num_tokens: int
) -> jax.Array:
    """int32 [2, B, V]: how often a token stands in the prompt (0) and the output (1) of a point's sequence."""
    num_points, length = row_B.shape[0], history_RS.shape[1]
    tile = min(HISTORY_TILE, length)
    lines = jnp.arange(num_points)[:, None]

    def count(turn, counts):
        # the last tile of a length that tiles do not divide begins earlier; `place` keeps what is counted apart
        start = jnp.minimum(turn * tile, length - tile)
        token = lax.dynamic_slice_in_dim(history_RS, start, tile, 1)[row_B]
        place = start + jnp.arange(tile)[None]
        known = (place >= turn * tile) & (place < position_B[:, None])
        output = (place >= draws.prompt_length_R[:, None]).astype(jnp.int32)
        return counts.at[output, lines, jnp.where(known, token, num_tokens)].add(1, mode="drop")

    turns = (jnp.max(jnp.minimum(position_B, length)) + tile - 1) // tile
    return lax.fori_loop(0, turns, count, jnp.zeros((2, num_points, num_tokens), jnp.int32))


def _penalised(x_BV: jax.Array, draws: Draws, history_RS: jax.Array, row_B: jax.Array, position_B: jax.Array):
    """Repetition over prompt and output, then frequency and presence over output alone."""
    repetition_B1, frequency_B1 = draws.repetition_R[:, None], draws.frequency_R[:, None]
    presence_B1 = draws.presence_R[:, None]

    def penalised(x_BV):
        prompt_BV, output_BV = _counts(draws, history_RS, row_B, position_B, x_BV.shape[1])
        seen_BV = (prompt_BV > 0) | (output_BV > 0)
        repeated_BV = jnp.where(x_BV > 0, x_BV / repetition_B1, x_BV * repetition_B1)
        x_BV = jnp.where(seen_BV, repeated_BV, x_BV)
        return x_BV - frequency_B1 * output_BV - presence_B1 * (output_BV > 0)

    return lax.cond(jnp.any(_penalty_wanted(draws)), penalised, lambda x_BV: x_BV, x_BV)


def _filtered(x_BV: jax.Array, most_B: jax.Array, draws: Draws) -> jax.Array:
    """Logits with what min_p, top_k and top_p cut at -inf; greedy rows as they are."""
    hot_B = draws.temperature_R > 0
    top_k_B = jnp.where(hot_B, draws.top_k_R, 0)
    top_p_B, min_p_B = jnp.where(hot_B, draws.top_p_R, 1.0), jnp.where(hot_B, draws.min_p_R, 0.0)

    def filtered(x_BV):
        degrees_B = jnp.where(hot_B, draws.temperature_R, 1.0)
        return jnp.where(kept(x_BV, most_B, degrees_B, top_k_B, top_p_B, min_p_B), x_BV, -jnp.inf)

    return lax.cond(jnp.any(_filter_wanted(draws)), filtered, lambda x_BV: x_BV, x_BV)


def _reported(raw_BV: jax.Array, token_B: jax.Array, wanted_B: jax.Array) -> tuple[jax.Array, ...]:
    """Log-probability and rank of `token_B` and the TOP best, under the raw logits; equals rank by id."""
    num_points, num_tokens = raw_BV.shape
    listed = min(TOP, num_tokens)

    def reported():
        most_B1 = jnp.max(raw_BV, 1, keepdims=True)
        total_B1 = jnp.log(tree_sum(jnp.exp(raw_BV - most_B1), keepdims=True))
        own_B1 = jnp.take_along_axis(raw_BV, token_B[:, None], 1)
        equal_before_BV = (raw_BV == own_B1) & (lax.iota(jnp.int32, num_tokens) < token_B[:, None])
        rank_B = 1 + jnp.sum((raw_BV > own_B1) | equal_before_BV, 1, dtype=jnp.int32)
        best, ids = lax.top_k(raw_BV, listed)
        ids = jnp.where(best > -jnp.inf, ids, -1)
        pad = ((0, 0), (0, TOP - listed))
        ids = jnp.pad(ids, pad, constant_values=-1)
        logprobs = jnp.pad(best - most_B1 - total_B1, pad, constant_values=-jnp.inf)
        return (own_B1 - most_B1 - total_B1)[:, 0], rank_B, ids, logprobs

    def nothing():
        shape = (num_points, TOP)
        zero_B = jnp.zeros(num_points, jnp.float32)
        return zero_B, jnp.zeros(num_points, jnp.int32), jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32)

    fields = lax.cond(jnp.any(wanted_B), reported, nothing)
    return tuple(jnp.where(jnp.expand_dims(wanted_B, range(1, f.ndim)), f, jnp.zeros_like(f)) for f in fields)
