"""The KV of a `Parts` on its way: which bytes, in which order, and how the receiver knows that they are right.

    header   handoff, generation, first, blocks | dtype, first head, K L n C H | checksums [K]
    payload  keys [K, L, n, C, H], then values: head first, so that what any shard wants is one piece

K are all heads of the lane, or those that one process of it has and another wants (engine/movers/spans.py).

The sender hands out views of what it holds, nothing is copied or joined. The receiver reads straight into two
buffers of its own and hands those on, read-only. What is of another dtype or shape than its lane's, or has other
checksums, is delivered as a `Parts` without `staged`: the core asks again, and gives up when it happens too often.
Checksums are taken head by head, so that a loop can do other things in between.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import msgpack
import numpy as np

from engine.core.handoff import CREDIT, Parts
from engine.errors import Malformed
from engine.movers.checksums import checksums
from engine.movers.fields import group, octets, text, whole
from engine.movers.geometry import Geometry
from engine.observe.plan_bytes import read_map

KIND = 80
ALIGNED = 64  # bytes; a CPU device takes over a buffer that begins at such an address
MOST_SUMS = 1 << 19  # bytes
AT_ONCE = 1 << 20  # bytes whose checksums are taken without a pause


class Heads(NamedTuple):
    """Keys and values of consecutive heads on the host, from `first_head` on."""

    keys_KLnCH: np.ndarray
    values_KLnCH: np.ndarray
    first_head: int = 0

    @property
    def stop_head(self) -> int:
        return self.first_head + len(self.keys_KLnCH)


class PartsHeader(NamedTuple):
    """What a frame says of its payload."""

    handoff: int
    generation: int
    first: int
    num_blocks: int
    dtype: str
    first_head: int
    heads: int
    layers: int
    size: int
    width: int
    sums: bytes

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        return self.heads, self.layers, self.num_blocks, self.size, self.width

    def without(self) -> Parts:
        """The part as it is delivered when its bytes are no good."""
        return Parts(self.handoff, self.generation, self.first, self.num_blocks, None)


FIELDS = group(
    PartsHeader,
    *(whole(key) for key in ("h", "g", "fi")),
    whole("nb", 1, CREDIT),
    text("dt", 64),
    *(whole(key, 0, 1 << 16) for key in ("fh", "k", "l", "c", "w")),
    octets("su", MOST_SUMS),
)


def shards(part: Parts) -> tuple[Heads, ...]:
    """`part.staged` as heads in order: it is Heads, or a sequence of them, each beginning where the last ends."""
    staged = part.staged
    if staged is None:
        return ()
    found = (staged,) if isinstance(staged, Heads) else tuple(staged)  # type: ignore[call-overload]
    assert found and all(before.stop_head == after.first_head for before, after in pairwise(found))
    return found


def num_bytes(part: Parts) -> int:
    """Of its payload."""
    return sum(each.keys_KLnCH.nbytes + each.values_KLnCH.nbytes for each in shards(part))


def sums_by_head(part: Parts) -> Iterator[np.ndarray]:
    """Checksums [k] of one head after the other, or of some heads where these are small."""
    for keys, values, _ in shards(part):
        step = max(AT_ONCE // max(2 * keys[:1].nbytes, 1), 1)
        for head in range(0, len(keys), step):
            yield checksums(keys[head : head + step], values[head : head + step])


def header_of(part: Parts, sums: list[np.ndarray]) -> bytes:
    """The header of its frame."""
    pieces = shards(part)
    if not pieces:
        about = PartsHeader(*part[:4], "", 0, 0, 0, 0, 0, b"")
    else:
        _, layers, _, size, width = pieces[0].keys_KLnCH.shape
        first, stop = pieces[0].first_head, pieces[-1].stop_head
        dtype, data = pieces[0].keys_KLnCH.dtype.name, b"".join(each.tobytes() for each in sums)
        about = PartsHeader(*part[:4], dtype, first, stop - first, layers, size, width, data)
    return msgpack.packb(FIELDS.write(about, 0.0))


def views(part: Parts) -> Iterator[memoryview]:
    """The payload, in order, as it lies in memory."""
    pieces = shards(part)
    for which in range(2):
        for piece in pieces:
            array_KLnCH = piece[which]
            if array_KLnCH.flags.c_contiguous:
                yield memoryview(array_KLnCH.reshape(-1).view(np.uint8))
            else:
                heads, layers = array_KLnCH.shape[:2]
                for line in array_KLnCH.reshape(heads * layers, -1).view(np.uint8):
                    yield memoryview(line)


def read_header(data: bytes | bytearray | memoryview, payload: int) -> PartsHeader:
    """What `data` says of a payload of so many bytes. Raises Malformed."""
    header = FIELDS.read(read_map(bytes(data), FIELDS.schema, "parts"), 0.0)
    assert isinstance(header, PartsHeader)
    if len(header.sums) != 8 * header.heads:
        raise Malformed(f"parts: got {len(header.sums)} bytes of checksums; expected {8 * header.heads}")
    if (payload == 0) != (header.heads == 0):
        raise Malformed("parts: got checksums without blocks, or blocks without checksums")
    return header


class Intake:
    """Buffers for one part, and the judgement of what is in them.

    They are the receiver's own, or `memory` where the whole payload lies already.
    """

    def __init__(self, header: PartsHeader, payload: int, geometry: Geometry, memory: np.ndarray | None = None):
        self.header = header
        shape, dtype = geometry.shape(header.num_blocks, header.heads), geometry.numpy_dtype()
        size = int(np.prod(shape)) * dtype.itemsize
        inside = 0 < header.heads <= geometry.kv_heads - header.first_head
        self.fits = inside and (header.dtype, header.shape, payload) == (geometry.dtype, shape, 2 * size)
        self.heads: Heads | None = None
        if self.fits and memory is None:
            self.heads = Heads(*(_empty(shape, dtype, size) for _ in range(2)), header.first_head)
        elif self.fits:
            halves = memory[:size], memory[size:]
            self.heads = Heads(*(half.view(dtype).reshape(shape) for half in halves), header.first_head)

    def views(self) -> Iterator[memoryview]:
        """Where the payload goes, in order."""
        assert self.heads is not None
        for array in self.heads[:2]:
            yield memoryview(array.reshape(-1).view(np.uint8))

    def damaged_heads(self) -> Iterator[bool]:
        """Head after head, whether it is not what its checksums say."""
        assert self.heads is not None
        sums_K = np.frombuffer(self.header.sums, "<u8")
        part = self.header.without()._replace(staged=self.heads)
        head = 0
        for found in sums_by_head(part):
            yield not np.array_equal(found, sums_K[head : head + len(found)])
            head += len(found)

    def part(self) -> Parts:
        """The part with its blocks, which nobody here keeps and nobody can write."""
        assert self.heads is not None
        for array in self.heads[:2]:
            array.flags.writeable = False
        return self.header.without()._replace(staged=self.heads)


def _empty(shape: tuple[int, ...], dtype: np.dtype, size: int) -> np.ndarray:
    """An array that begins at an aligned address."""
    room = np.empty(size + ALIGNED, np.uint8)
    start = -room.ctypes.data % ALIGNED
    return room[start : start + size].view(dtype).reshape(shape)
