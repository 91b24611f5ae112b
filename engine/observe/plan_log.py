"""The plan log: what one lane asked of its device and what came back, in one file, in order.

    file     MAGIC, then frames, each whole or, the last one after a crash, cut short
    frame    kind, length, checksum of these two, checksum of the body; body
    HEADER   first, once: what was served, on what
    PLAN     at launch        RESULT   at collect        FAILURE  a launch or a collect that raised
    RESET    the device was made anew                    MOVED    blocks were written from outside the lane

A head has a checksum of its own, so that a damaged length is no end of the file. It holds the token ids of prompts
and answers. engine/observe/plan_writer.py writes it; `PlanLog` here reads it, a record at a time.
Cost: that of engine/observe/plan_bytes.py and 1 GB/s of checksums.
"""

import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import IO

import msgpack
import numpy as np

from engine.core.plan import StepPlan, StepResult
from engine.errors import ConfigError, Malformed, wrong
from engine.observe.plan_bytes import INT, MAX_BYTES, Bounds, decode_plan, decode_result, read_map

MAGIC = b"serac plan log 1\n"
FRAME = struct.Struct("<BIII")
HEAD = struct.Struct("<BI")
HEADER, PLAN, RESULT, FAILURE, RESET, MOVED = range(6)


@dataclass(frozen=True, slots=True)
class Header:
    """What was served and on what. lane: its name; mesh: its devices, as --mesh takes them."""

    lane: str
    model: str
    revision: str
    dtype: str
    kv_dtype: str  # auto, or of 8-bit pools
    numerics: str
    mesh: str
    device: str
    num_blocks: int
    block_size: int
    max_rows: int
    max_length: int
    max_tokens: int
    vocab: int
    serac: str
    jax: str
    jaxlib: str

    @property
    def bounds(self) -> Bounds:
        """The sizes that a plan of this lane keeps to."""
        return Bounds(*(getattr(self, name) for name in Bounds._fields))


@dataclass(frozen=True, slots=True)
class Failure:
    """A step whose launch or collect raised an error of this type."""

    step: int
    at: str  # launch | collect
    error: str


@dataclass(frozen=True, slots=True)
class Reset:
    """The device was made anew; nothing was in flight afterwards."""


@dataclass(frozen=True, slots=True)
class Moved:
    """Blocks that another lane's content was written to; that content is not in the log."""

    blocks: np.ndarray  # int32


Record = StepPlan | StepResult | Failure | Reset | Moved
HEADER_SCHEMA = {row.name: (row.type,) for row in fields(Header)}
FAILURE_SCHEMA = {row.name: (row.type,) for row in fields(Failure)}


def frame(kind: int, body: bytes) -> bytes:
    """One record as it stands in a file."""
    return FRAME.pack(kind, len(body), zlib.crc32(HEAD.pack(kind, len(body))), zlib.crc32(body)) + body


def encode_record(record: Header | Failure) -> bytes:
    """The body of a header or a failure."""
    return msgpack.packb(asdict(record))


class PlanLog:
    """A log to read. Its records are numbered from 1; the header is record 0."""

    def __init__(self, path: Path):
        """Read the header. Raises ConfigError for a file that cannot be read, Malformed for one that is no log."""
        self.path, self.lost_bytes = path, 0
        for _, kind, body in self._frames():
            if kind != HEADER:
                break
            self.header = Header(**self._said(0, read_map, body, HEADER_SCHEMA, "header"))
            return
        raise Malformed(f"{path}: got a plan log without a header")

    def records(self) -> Iterator[Record]:
        """Every whole record after the header. Afterwards `lost_bytes` says what stood behind the last one.

        Raises Malformed, naming the record, where one is damaged.
        """
        for number, kind, body in self._frames():
            if number > 0:
                yield self._said(number, _decode, kind, body)

    def _said(self, number: int, read: Callable, *arguments):
        """What `read` returns of `arguments`; its refusal is told with the file and the record."""
        try:
            return read(*arguments)
        except Malformed as error:
            raise Malformed(f"{self.path}: record {number}: {error}") from None

    def _frames(self) -> Iterator[tuple[int, int, bytes]]:
        try:
            with self.path.open("rb") as file:
                if file.read(len(MAGIC)) != MAGIC:
                    raise Malformed(f"{self.path}: got other first bytes than those of a plan log of format 1")
                yield from self._frames_of(file)
        except OSError as error:
            raise ConfigError(
                wrong("FILE", self.path, f"a readable file ({error.strerror})"), field="file"
            ) from None

    def _frames_of(self, file: IO[bytes]) -> Iterator[tuple[int, int, bytes]]:
        number = 0
        while len(head := file.read(FRAME.size)) == FRAME.size:
            kind, length, head_sum, body_sum = FRAME.unpack(head)
            if zlib.crc32(HEAD.pack(kind, length)) != head_sum or length > MAX_BYTES:
                raise Malformed(f"{self.path}: record {number}: got a head of another checksum")
            body = file.read(length)
            if len(body) < length:
                head += body
                break
            if zlib.crc32(body) != body_sum:
                raise Malformed(f"{self.path}: record {number}: got a body of another checksum")
            yield number, kind, body
            number += 1
        self.lost_bytes = len(head)


def _decode(kind: int, body: bytes) -> Record:
    if kind == PLAN:
        return decode_plan(body)
    if kind == RESULT:
        return decode_result(body)
    if kind == FAILURE:
        failure = Failure(**read_map(body, FAILURE_SCHEMA, "failure"))
        if failure.at in ("launch", "collect"):
            return failure
    if kind == RESET and not body:
        return Reset()
    if kind == MOVED and len(body) % INT.itemsize == 0:
        return Moved(np.frombuffer(body, INT))
    raise Malformed(f"got a record of kind {kind} that no reader of format 1 knows")
