"""What the processes of one lane say to each other: orders of the leader, and what a follower answers.

    leader -> follower   Plan  Gather Send  Scatter Drop  Reset  Born Known Forget  Go  Beat
    follower -> leader   At  Drawn  Have  Here  Unable  Beat

Orders are carried out in the order that they were said, each device program in the order of the leader's. A frame
is one of engine/movers/frames.py, its header a flat msgpack map, that of a Plan its number and the bytes of
engine/observe/plan_bytes.py. Whatever is not exactly one raises Malformed.
"""

import hashlib
import struct
from collections.abc import Mapping
from typing import NamedTuple

import msgpack

from engine.core.plan import StepPlan, StepResult
from engine.errors import Malformed
from engine.movers.fields import WIDE, Field, group, text, texts, whole, wholes
from engine.movers.frames import frame
from engine.observe.plan_bytes import decode_plan, encode_plan, read_map

NAME, SENTENCE = 256, 4096  # bytes
NUMBER = struct.Struct("<Q")
DIGEST = 7  # bytes


class Key(NamedTuple):
    """Which blocks came: the first, of which asking, of which handoff."""

    handoff: int
    generation: int
    first: int


class Plan(NamedTuple):
    """Launch this; `number` counts the plans of a lane from 1."""

    number: int
    plan: StepPlan


class Gather(NamedTuple):
    """Read these blocks; a Send follows."""

    blocks: tuple[int, ...]


class Send(NamedTuple):
    """What was gathered longest ago goes to `lane`, each process's heads to those that want them."""

    lane: str
    handoff: int
    generation: int
    first: int
    num_blocks: int


class Scatter(NamedTuple):
    """Write what came under this key into these blocks."""

    handoff: int
    generation: int
    first: int
    blocks: tuple[int, ...]


class Drop(NamedTuple):
    """Forget what came under this key."""

    handoff: int
    generation: int
    first: int


class Reset(NamedTuple):
    """Make the device state anew, after the steps that were launched."""


class Born(NamedTuple):
    """The lane lives under this name from now on; say where its others reach you."""

    name: str


class Known(NamedTuple):
    """Another lane has `tp` devices and is reached at these addresses, one a process."""

    lane: str
    addresses: tuple[str, ...]
    tp: int


class Forget(NamedTuple):
    """What leads to this lane is closed."""

    lane: str


class Go(NamedTuple):
    """All processes are where you are; go on."""


class Beat(NamedTuple):
    """I am there."""


class At(NamedTuple):
    """Where the processes of other lanes reach this one."""

    addresses: tuple[str, ...]


class Drawn(NamedTuple):
    """Plan `number` has run; the digest of what it drew here."""

    number: int
    digest: int


class Have(NamedTuple):
    """The heads of this process of a part of lane `lane` are all here; `whole` or damaged."""

    lane: str
    handoff: int
    generation: int
    first: int
    num_blocks: int
    whole: int


class Here(NamedTuple):
    """I have come so far, and wait for the others. `found` names what all must have alike."""

    found: str


class Unable(NamedTuple):
    """I cannot go on; why."""

    reason: str


BLOCKS = wholes("b", WIDE)
KEY = (whole("h"), whole("g"), whole("f"))
FIELDS: Mapping[int, tuple[type, Field]] = {
    129: (Gather, group(Gather, BLOCKS)),
    130: (Send, group(Send, text("l", NAME), *KEY, whole("n"))),
    131: (Scatter, group(Scatter, *KEY, BLOCKS)),
    132: (Drop, group(Drop, *KEY)),
    133: (Reset, group(Reset)),
    134: (Born, group(Born, text("l", NAME))),
    135: (Known, group(Known, text("l", NAME), texts("a"), whole("t", 1))),
    136: (Forget, group(Forget, text("l", NAME))),
    137: (Go, group(Go)),
    138: (Beat, group(Beat)),
    160: (At, group(At, texts("a"))),
    161: (Drawn, group(Drawn, whole("n"), whole("d"))),
    162: (Have, group(Have, text("l", NAME), *KEY, whole("n"), whole("w", 0, 1))),
    163: (Here, group(Here, text("x", SENTENCE))),
    164: (Unable, group(Unable, text("x", SENTENCE))),
}
PLAN = 128
NUMBERS = {kind: number for number, (kind, _) in FIELDS.items()}


def to_frame(order: NamedTuple) -> bytes:
    """The frame of an order or an answer."""
    if isinstance(order, Plan):
        return frame(PLAN, NUMBER.pack(order.number) + encode_plan(order.plan))
    number = NUMBERS[type(order)]
    return frame(number, msgpack.packb(FIELDS[number][1].write(order, 0.0)))


def from_frame(number: int, header: bytes) -> object:
    """What a frame of this kind says. Raises Malformed."""
    if number == PLAN:
        if len(header) < NUMBER.size:
            raise Malformed("plan: got a frame without its number")
        return Plan(NUMBER.unpack_from(header)[0], decode_plan(header[NUMBER.size :]))
    if number not in FIELDS:
        raise Malformed(f"order: got kind {number}; expected one of those of a lane")
    kind, field = FIELDS[number]
    return field.read(read_map(header, field.schema, kind.__name__), 0.0)


def digest(result: StepResult) -> int:
    """Of what a step drew; equal on every process of a lane."""
    data = result.tokens.tobytes() + result.finite.tobytes()
    return int.from_bytes(hashlib.blake2b(data, digest_size=DIGEST).digest(), "little")
