"""The sampling records of all rows, as the device keeps them, and how one record travels there.

    Draw (host) --encode--> int32 [W] --in the step's packed array--> decode --store--> Draws, a line a row
                                                                      Draws --at_points--> a line a point

A record is written once, when a sequence takes a row; steps only gather. `FIELDS` is the layout: one row a field,
in the order of the packed record; floats and halves of the seed travel as their bits. Lists are padded with
NO_TOKEN, which every scatter drops. Cost: W = 2,125 words (8.5 kB) a loaded row.
Source: the record of core/plan.py; DESIGN.md "Numerics" for the seed's two halves.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from engine.core.plan import Draw

MAX_STOP_IDS = 64
MAX_BIAS = 1024
NO_TOKEN = 2**31 - 1  # past every vocabulary
SMALLEST = float(np.finfo(np.float32).tiny)


class Draws(NamedTuple):
    """Sampling records; R is rows of a lane, or points once gathered."""

    seed_high_R: jax.Array  # uint32
    seed_low_R: jax.Array  # uint32
    choice_R: jax.Array  # int32
    prompt_length_R: jax.Array  # int32
    temperature_R: jax.Array  # float32; 0 is greedy
    top_k_R: jax.Array  # int32; 0 is off
    top_p_R: jax.Array  # float32
    min_p_R: jax.Array  # float32
    repetition_R: jax.Array  # float32; 1 is off
    frequency_R: jax.Array  # float32
    presence_R: jax.Array  # float32
    masked_until_R: jax.Array  # int32
    logprobs_R: jax.Array  # int32; -1 is none
    stop_ids: jax.Array  # int32 [R, MAX_STOP_IDS]
    bias_ids: jax.Array  # int32 [R, MAX_BIAS]
    bias_values: jax.Array  # float32 [R, MAX_BIAS]


FIELDS = (
    ("seed_high_R", np.uint32, 1),
    ("seed_low_R", np.uint32, 1),
    ("choice_R", np.int32, 1),
    ("prompt_length_R", np.int32, 1),
    ("temperature_R", np.float32, 1),
    ("top_k_R", np.int32, 1),
    ("top_p_R", np.float32, 1),
    ("min_p_R", np.float32, 1),
    ("repetition_R", np.float32, 1),
    ("frequency_R", np.float32, 1),
    ("presence_R", np.float32, 1),
    ("masked_until_R", np.int32, 1),
    ("logprobs_R", np.int32, 1),
    ("stop_ids", np.int32, MAX_STOP_IDS),
    ("bias_ids", np.int32, MAX_BIAS),
    ("bias_values", np.float32, MAX_BIAS),
)
WIDTH = sum(width for _, _, width in FIELDS)
RECORD = np.dtype([(name, dtype, (width,)) if width > 1 else (name, dtype) for name, dtype, width in FIELDS])
UNLISTED = np.zeros(1, RECORD)  # a record whose lists are empty
UNLISTED["stop_ids"] = UNLISTED["bias_ids"] = NO_TOKEN

BLANK = Draw(
    seed=0,
    choice=0,
    prompt_length=0,
    temperature=0.0,
    top_k=0,
    top_p=1.0,
    min_p=0.0,
    repetition_penalty=1.0,
    frequency_penalty=0.0,
    presence_penalty=0.0,
    logit_bias=(),
    masked_until=0,
    stop_ids=(),
    logprobs=-1,
)  # greedy, with nothing else to do: what an empty row holds


def encode(draw: Draw) -> np.ndarray:
    """The record as int32 [WIDTH].

    A temperature that float32 would round to zero, which is greedy, becomes the smallest normal float32: the draw
    is then among the best alone, as it should be.
    Raises ValueError when a list is longer than the record has room for.
    """
    if len(draw.stop_ids) > MAX_STOP_IDS or len(draw.logit_bias) > MAX_BIAS:
        raise ValueError(
            f"record: got {len(draw.stop_ids)} stop ids and {len(draw.logit_bias)} biases; "
            f"expected at most {MAX_STOP_IDS} and {MAX_BIAS}"
        )
    scalars = (
        draw.seed >> 32,
        draw.seed & 0xFFFFFFFF,
        draw.choice,
        draw.prompt_length,
        max(draw.temperature, SMALLEST) if draw.temperature > 0 else 0.0,
        draw.top_k,
        draw.top_p,
        draw.min_p,
        draw.repetition_penalty,
        draw.frequency_penalty,
        draw.presence_penalty,
        draw.masked_until,
        draw.logprobs,
    )
    packed = UNLISTED.copy()
    record = packed[0]
    for (name, _, _), value in zip(FIELDS, scalars, strict=False):
        record[name] = value
    record["stop_ids"][: len(draw.stop_ids)] = draw.stop_ids
    if draw.logit_bias:
        ids, values = zip(*draw.logit_bias, strict=True)
        record["bias_ids"][: len(ids)], record["bias_values"][: len(ids)] = ids, values
    return packed.view(np.int32)


def decode(packed_RW: jax.Array) -> Draws:
    """Records from their packed lines, int32 [R, WIDTH]; pure, for use inside jit."""
    fields, start = {}, 0
    for name, dtype, width in FIELDS:
        words = packed_RW[:, start] if width == 1 else packed_RW[:, start : start + width]
        fields[name] = lax.bitcast_convert_type(words, dtype)
        start += width
    return Draws(**fields)


def empty(num_rows: int) -> Draws:
    """Records of `num_rows` empty rows."""
    return decode(jnp.asarray(np.tile(encode(BLANK), (num_rows, 1))))


def store(draws: Draws, row_L: jax.Array, packed_LW: jax.Array) -> Draws:
    """`draws` with packed records written into their rows; a row at or past R is dropped."""
    return jax.tree.map(lambda old, new: old.at[row_L].set(new, mode="drop"), draws, decode(packed_LW))


def at_points(draws: Draws, row_B: jax.Array) -> Draws:
    """The records of the rows that points stand in."""
    return jax.tree.map(lambda field: field[row_B], draws)
