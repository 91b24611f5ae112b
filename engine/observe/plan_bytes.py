"""The bytes of a StepPlan and of a StepResult: what a follower is sent, a plan log holds and a replay reads.

    StepPlan   --encode_plan-->   one msgpack map of PLAN's keys    --decode_plan-->   StepPlan
    StepResult --encode_result--> one msgpack map of RESULT's keys  --decode_result--> StepResult

A map is flat: integers, switches and byte strings. A byte string is an array whose dtype and shape the schema
fixes, little-endian. What every Load has stands in one array of LOAD records; their tokens, tables, biases and stop
ids follow each other in arrays of their own, so that neither depth nor length of a message can make a reader build
more than its bytes. Whatever is not exactly so, or says of itself what its rows do not, is Malformed, and nothing
else is ever raised.

Cost on one core, encode and decode, in us. A full result of 4,096 points has 0.7 MB; copying it takes from 50 us to
1 ms as the allocator keeps or returns its pages.

    rows             1         64        4,096
    plan             4   27    4   29    11  107
    plain result     2   13    2   13     3   14
    full result      2   17    3   18    50   40
    64 Loads of 100 tokens: 90 and 350

Source: the fixed schemas of msgpack that RELIABILITY.md asks of the internal plane (F1 to F11).
"""

from collections.abc import Iterable, Mapping
from operator import attrgetter
from typing import NamedTuple

import msgpack
import numpy as np

from engine.core.plan import COUNT, DRAW, SCORE, TOP, Draw, Load, StepPlan, StepResult
from engine.errors import Malformed

MAX_BYTES = 64 << 20
INT, FLOAT = np.dtype("<i4"), np.dtype("<f4")
WIDE, DOUBLE = "<i8", "<f8"
FIELDS = 6  # of a row
PLAN: Mapping[str, tuple[type, ...]] = {
    "step": (int,),
    "rows": (bytes,),  # int32 [rows, 6]
    "num_tokens": (int,),
    "num_points": (int,),
    "one_token": (bool,),
    "plain": (bool,),
    "loads": (bytes,),  # LOAD [loads]
    "tokens": (bytes,),  # int32, those of the first load, then of the next
    "blocks": (bytes,),  # int32
    "bias_ids": (bytes,),  # int32
    "bias_values": (bytes,),  # float64
    "stop_ids": (bytes,),  # int32
}
RESULT: Mapping[str, tuple[type, ...]] = {
    "step": (int,),
    "tokens": (bytes,),  # int32 [points]
    "finite": (bytes,),  # one byte a point, 0 or 1
    "logprob": (bytes, type(None)),  # float32 [points]
    "rank": (bytes, type(None)),  # int32 [points]
    "top_ids": (bytes, type(None)),  # int32 [20, points], as the device lays them out
    "top_logprobs": (bytes, type(None)),  # float32 [20, points]
}
SCALARS = {  # of Draw, in its order; Python's numbers come back as they were
    "seed": WIDE,
    "choice": WIDE,
    "prompt_length": WIDE,
    "temperature": DOUBLE,
    "top_k": WIDE,
    "top_p": DOUBLE,
    "min_p": DOUBLE,
    "repetition_penalty": DOUBLE,
    "frequency_penalty": DOUBLE,
    "presence_penalty": DOUBLE,
    "masked_until": WIDE,
    "logprobs": WIDE,
}
COUNTS = ("num_tokens", "num_blocks", "num_biases", "num_stops")
LOAD = np.dtype([("row", INT), *((name, INT) for name in COUNTS), *SCALARS.items()])
FIRST_SCALAR = 1 + len(COUNTS)
scalars_of = attrgetter(*SCALARS)


class Bounds(NamedTuple):
    """Sizes of the lane that a plan is for; a plan of another lane may be whole and still not run here."""

    num_blocks: int
    block_size: int
    max_rows: int
    max_length: int
    max_tokens: int
    vocab: int


def encode_plan(plan: StepPlan) -> bytes:
    """The bytes of `plan`. Raises Malformed when they are more than a reader takes."""
    loads = plan.loads
    records = [
        (load.row, len(load.tokens), len(load.blocks), len(load.draw.logit_bias), len(load.draw.stop_ids))
        + scalars_of(load.draw)
        for load in loads
    ]
    biases = [bias for load in loads for bias in load.draw.logit_bias]
    return _packed(
        {
            "step": plan.step,
            "rows": _bytes(plan.rows, INT),
            "num_tokens": int(plan.num_tokens),
            "num_points": int(plan.num_points),
            "one_token": bool(plan.one_token),
            "plain": bool(plan.plain),
            "loads": np.array(records, LOAD).tobytes() if records else b"",
            "tokens": b"".join(_bytes(load.tokens, INT) for load in loads),
            "blocks": b"".join(_bytes(load.blocks, INT) for load in loads),
            "bias_ids": _bytes([token for token, _ in biases], INT),
            "bias_values": _bytes([value for _, value in biases], DOUBLE),
            "stop_ids": _bytes([token for load in loads for token in load.draw.stop_ids], INT),
        }
    )


def decode_plan(data: bytes) -> StepPlan:
    """The plan whose bytes these are; its arrays cannot be written. Raises Malformed."""
    got = read_map(data, PLAN, "plan")
    rows = _array(got, "rows", INT, FIELDS)
    plan = StepPlan(
        got["step"], rows, _loads(got), got["num_tokens"], got["num_points"], got["one_token"], got["plain"]
    )
    sums = rows.sum(axis=0, dtype=np.int64)
    _require(plan.step >= 0, "plan: got a step before the first")
    _require(not rows.size or int(rows.min()) >= 0, "plan: got a negative number in its rows")
    _require(plan.num_tokens == sums[COUNT], "plan: got a number of tokens that its rows do not have")
    _require(plan.num_points == sums[SCORE] + sums[DRAW], "plan: got a number of points that its rows do not have")
    _require(not plan.one_token or bool((rows[:, COUNT] == 1).all()), "plan: got rows of more than one token")
    few = rows[:, SCORE].astype(np.int64) + rows[:, DRAW] <= rows[:, COUNT]
    _require(bool((rows[:, DRAW] <= 1).all() and few.all()), "plan: got a row with more points than tokens")
    return plan


def check_plan(plan: StepPlan, bounds: Bounds) -> None:
    """Raise Malformed where a lane of these sizes cannot run `plan`: it would read or write what is not there."""
    row, start, count, block = (plan.rows[:, k].astype(np.int64) for k in range(4))
    width = -(-bounds.max_length // bounds.block_size)
    _require(plan.num_tokens <= bounds.max_tokens, "plan: got more tokens than a step of this lane takes")
    _require(max(len(row), plan.num_points) <= bounds.max_rows, "plan: got more rows or points than this lane has")
    inside = (row < bounds.max_rows) & (start + count <= bounds.max_length) & (block < bounds.num_blocks)
    _require(bool(inside.all()), "plan: got a row, position or block past those of this lane")
    for load in plan.loads:
        fits = load.row < bounds.max_rows and len(load.tokens) <= bounds.max_length and len(load.blocks) <= width
        _require(fits, "plan: got a load that is larger than a row of this lane")
        _require(_within(load.tokens, bounds.vocab), "plan: got a token past the vocabulary")
        _require(_within(load.blocks, bounds.num_blocks), "plan: got a block past the pool")


def encode_result(result: StepResult) -> bytes:
    """The bytes of `result`. Raises Malformed when they are more than a reader takes."""
    full = result.logprob is not None
    return _packed(
        {
            "step": result.step,
            "tokens": _bytes(result.tokens, INT),
            "finite": _bytes(result.finite, np.dtype(bool)),
            "logprob": _bytes(result.logprob, FLOAT) if full else None,
            "rank": _bytes(result.rank, INT) if full else None,
            "top_ids": _bytes(result.top_ids.T, INT) if full else None,
            "top_logprobs": _bytes(result.top_logprobs.T, FLOAT) if full else None,
        }
    )


def decode_result(data: bytes) -> StepResult:
    """The result whose bytes these are; its arrays cannot be written. Raises Malformed."""
    got = read_map(data, RESULT, "result")
    tokens, finite = _array(got, "tokens", INT), _array(got, "finite", np.dtype(np.uint8))
    _require(got["step"] >= 0, "result: got a step before the first")
    _require(len(finite) == len(tokens) and not (finite > 1).any(), "result: got other than one switch a point")
    rest = [got[name] for name in ("logprob", "rank", "top_ids", "top_logprobs")]
    if not any(column is not None for column in rest):
        return StepResult(got["step"], tokens, finite.view(bool))
    _require(all(column is not None for column in rest), "result: got a part of what a full result has")
    logprob, rank = _array(got, "logprob", FLOAT), _array(got, "rank", INT)
    tops = _array(got, "top_ids", INT), _array(got, "top_logprobs", FLOAT)
    alike = {len(tokens), len(logprob), len(rank), *(len(top) / TOP for top in tops)}
    _require(len(alike) == 1, "result: got arrays of unlike lengths")
    top_ids, top_logprobs = (top.reshape(TOP, -1).T for top in tops)
    return StepResult(got["step"], tokens, finite.view(bool), logprob, rank, top_ids, top_logprobs)


def _loads(got: Mapping) -> tuple[Load, ...]:
    records = _array(got, "loads", LOAD)
    tokens, blocks = _array(got, "tokens", INT), _array(got, "blocks", INT)
    bias_ids, bias_values = _array(got, "bias_ids", INT), _array(got, "bias_values", np.dtype(DOUBLE))
    stop_ids = _array(got, "stop_ids", INT)
    held = (tokens, blocks, bias_ids, stop_ids)
    _require(len(bias_values) == len(bias_ids), "plan: got biases without their values")
    if not len(records):
        _require(not any(len(array) for array in held), "plan: got contents of a load that is not there")
        return ()
    counts = np.stack([records[name] for name in COUNTS], axis=1).astype(np.int64)
    _require(bool((counts >= 0).all() and (records["row"] >= 0).all()), "plan: got a load of negative size or row")
    ends = np.cumsum(counts, axis=0)
    _require([len(array) for array in held] == ends[-1].tolist(), "plan: got loads of other sizes than they say")
    biases = list(zip(bias_ids.tolist(), bias_values.tolist(), strict=True))
    stops, loads = stop_ids.tolist(), []
    for record, first, last in zip(records.tolist(), (ends - counts).tolist(), ends.tolist(), strict=True):
        fields = dict(zip(SCALARS, record[FIRST_SCALAR:], strict=True))
        fields["logit_bias"] = tuple(biases[first[2] : last[2]])
        draw = Draw(**fields, stop_ids=tuple(stops[first[3] : last[3]]))
        loads.append(Load(record[0], tokens[first[0] : last[0]], blocks[first[1] : last[1]], draw))
    return tuple(loads)


def read_map(data: bytes, schema: Mapping[str, tuple[type, ...]], what: str) -> dict:
    """The flat map in `data`, which has every key of `schema`, once, and no other. Raises Malformed."""
    _require(len(data) <= MAX_BYTES, f"{what}: got {len(data)} bytes; expected at most {MAX_BYTES}")

    def checked(items: list[tuple]) -> dict:
        """Called for the innermost map first, so that a map in a map is refused before it grows."""
        found = dict(items)  # no more items than keys of the schema, so none of all of these stands twice
        _require(
            found.keys() == schema.keys(), f"{what}: got a map of other keys than {', '.join(schema)}, each once"
        )
        return found

    try:
        got = msgpack.unpackb(
            data, object_pairs_hook=checked, max_array_len=0, max_ext_len=0, max_map_len=len(schema)
        )
    except (ValueError, msgpack.UnpackException) as error:
        raise Malformed(f"{what}: got bytes that are no msgpack map ({type(error).__name__})") from None
    _require(isinstance(got, dict), f"{what}: got no map; expected one of {', '.join(schema)}")
    for name, kinds in schema.items():
        expected = f"expected {' or '.join(kind.__name__ for kind in kinds)}"
        _require(type(got[name]) in kinds, f"{what}: got {name} as {type(got[name]).__name__}; {expected}")
    return got


def _array(got: Mapping, name: str, dtype: np.dtype, width: int = 0) -> np.ndarray:
    data, size = got[name], dtype.itemsize * (width or 1)
    _require(len(data) % size == 0, f"{name}: got {len(data)} bytes; expected a multiple of {size}")
    array = np.frombuffer(data, dtype)
    return array.reshape(-1, width) if width else array


def _bytes(values: Iterable, dtype: np.dtype | str) -> bytes:
    return np.asarray(values, dtype).tobytes()


def _packed(columns: dict) -> bytes:
    data = msgpack.packb(columns)
    _require(len(data) <= MAX_BYTES, f"message: got {len(data)} bytes; expected at most {MAX_BYTES}")
    return data


def _within(numbers: np.ndarray, end: int) -> bool:
    return not len(numbers) or (int(numbers.min()) >= 0 and int(numbers.max()) < end)


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise Malformed(otherwise)
