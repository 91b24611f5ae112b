"""Frames: what stands on a connection, one after the other.

    prefix, 32 bytes                                                            header       payload
    "SRAC" | version u16 | kind u16 | header u32 | payload u64 | sum u64 | u32 | ...          ...
                                      bytes        bytes         of the    of the prefix
                                                                 header
Little-endian. The prefix has a checksum of its own, so that a damaged length is noticed before anything is read or
reserved by it. The header is the map of a message; the KV of a `Parts` follows as payload, which is covered by the
checksums that its header holds. What is not a whole, right frame raises Malformed.

The layout of the prefix is that of every version. The version says which tables the header is read by
(engine/movers/words.py); two processes speak the highest that both know, so that a cluster can go over to the next
release one process at a time. A greeting is of version GREETING for ever: there they find it out.
"""

import struct
from typing import NamedTuple

from xxhash import xxh3_64_intdigest

from engine.errors import Malformed
from engine.observe.plan_bytes import MAX_BYTES

MAGIC, GREETING = b"SRAC", 1
LAYOUT = struct.Struct("<4sHHIQQ")
PREFIX = LAYOUT.size + 4
MAX_PAYLOAD = 1 << 30
LOW = (1 << 32) - 1


class Versions(NamedTuple):
    """Those that a process speaks, and all between."""

    newest: int
    oldest: int

    def agreed(self, other: "Versions") -> int | None:
        """The highest that both speak."""
        common = min(self.newest, other.newest)
        return common if common >= max(self.oldest, other.oldest) else None


SPOKEN = Versions(1, 1)


class Prefix(NamedTuple):
    """Of a frame: its kind, and how many bytes follow."""

    kind: int
    header: int
    payload: int
    header_sum: int


def frame(kind: int, header: bytes, payload: int = 0, version: int = SPOKEN.newest) -> bytes:
    """A frame up to its payload, which has `payload` bytes."""
    first = LAYOUT.pack(MAGIC, version, kind, len(header), payload, xxh3_64_intdigest(header))
    return b"".join((first, _sum(first), header))


def read_prefix(
    data: bytes | memoryview,
    most_header: int = MAX_BYTES,
    most_payload: int = MAX_PAYLOAD,
    version: int = SPOKEN.newest,
) -> Prefix:
    """What the first bytes of a frame say, which is to be of `version`. Raises Malformed."""
    magic, found, *numbers = LAYOUT.unpack_from(data)
    if magic != MAGIC:
        raise Malformed("frame: got other bytes than those every frame begins with")
    if found != version:
        raise Malformed(f"frame: got protocol version {found}; expected {version}, which both ends agreed on")
    if bytes(data[LAYOUT.size : PREFIX]) != _sum(data[: LAYOUT.size]):
        raise Malformed("frame: got a prefix that came damaged")
    prefix = Prefix(*numbers)
    for name, got, most in (("header", prefix.header, most_header), ("payload", prefix.payload, most_payload)):
        if got > most:
            raise Malformed(f"frame: got a {name} of {got} bytes; expected at most {most}")
    return prefix


def check_header(prefix: Prefix, header: bytes | memoryview) -> None:
    """Raise Malformed when these are not the bytes that were sent."""
    if len(header) != prefix.header or xxh3_64_intdigest(header) != prefix.header_sum:
        raise Malformed("frame: got a header that came damaged")


def _sum(prefix: bytes | memoryview) -> bytes:
    return (xxh3_64_intdigest(prefix) & LOW).to_bytes(4, "little")
