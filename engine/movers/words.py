"""The bytes of what fronts and lanes say to each other: one table of kinds, one flat msgpack map a message.

    message --to_bytes(now)--> (kind, map) --from_bytes(kind, map, now)--> message, or Malformed

What a session carries is a map within its packet's. A `Parts` is a frame of its own (engine/movers/parts.py), since
KV does not pass through msgpack. A SeracError crosses as the name of its class in engine/errors.py, its message,
field and retry; a moment as the seconds until it, so that `now` is an argument of both sides.

Versions of the protocol have a table each, so that two releases can work together (engine/movers/versions.py).

Source: the fixed schemas of RELIABILITY.md 5.F; engine/observe/plan_bytes.py does the same for plans.
"""

from collections.abc import Mapping
from typing import NamedTuple

import msgpack

from engine import errors
from engine.core import handoff, membership, messages
from engine.core.blocks import Content
from engine.core.events import Emission
from engine.core.request import Request, Sampling, Stopping
from engine.core.sequence import Part
from engine.core.session import Packet
from engine.errors import Malformed, SeracError
from engine.movers.fields import (
    DOUBLE,
    FLOAT,
    INT,
    WIDE,
    Field,
    array,
    group,
    moment,
    octets,
    pairs,
    real,
    require,
    switch,
    text,
    texts,
    whole,
    wholes,
)
from engine.movers.frames import SPOKEN
from engine.observe.plan_bytes import MAX_BYTES, read_map

TOP = 20
LEAST_BETWEEN = 48  # sessions carry the numbers below
KEY = 32  # bytes of a block's key
NAME = 256  # bytes of a name
WORDS = 4096  # bytes of a sentence
ROLES = ("prefill", "decode", "both")
ANSWERS = ("cancelled", "complete", "unknown")
ERRORS = {
    name: kind for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, SeracError)
}
Message = (
    messages.ToLane | messages.ToFront | handoff.Message | membership.Said | membership.Answered | membership.Line
)


class Told(NamedTuple):
    """An error on its way."""

    kind: str
    message: str
    field: str | None
    retry_after_s: float | None


def _error() -> Field:
    """A SeracError, or None."""
    told = group(Told, text("ec", NAME), text("em", WORDS), text("ef", NAME, none=True), real("er", none=True))

    def write(value: object, now: float) -> dict:
        if not isinstance(value, SeracError):
            return dict.fromkeys(told.schema)
        kind = next(kind.__name__ for kind in type(value).__mro__ if kind.__name__ in ERRORS)
        field = None if value.field is None else _cut(value.field, NAME)
        return told.write(Told(kind, _cut(str(value), WORDS), field, value.retry_after_s), now)

    def read(got: Mapping, now: float) -> object:
        kind = got["ec"]
        if kind is None:
            require(all(got[key] is None for key in told.schema), "ec", None, "a class, or nothing of an error")
            return None
        require(kind in ERRORS and got["em"] is not None, "ec", kind, "a class of the tree, and a message")
        found = told.read(got, now)
        assert isinstance(found, Told)
        error = ERRORS[kind](found.message, field=found.field)
        error.retry_after_s = found.retry_after_s
        return error

    return Field({key: (*kinds, type(None)) for key, kinds in told.schema.items()}, write, read)


def _parts() -> Field:
    """A tuple of Part: their numbers, and all their tokens in one array."""
    schema = dict.fromkeys(("ps", "pc", "pk", "pt"), (bytes,))

    def write(value: object, now: float) -> dict:
        parts: tuple[Part, ...] = value  # type: ignore[assignment]
        columns = {"ps": [p.serial for p in parts], "pc": [p.choice for p in parts]}
        columns |= {"pk": [len(p.emitted) for p in parts], "pt": [token for p in parts for token in p.emitted]}
        return {
            key: wide.write(column, now)[key] for (key, column), wide in zip(columns.items(), wides, strict=True)
        }

    def read(got: Mapping, now: float) -> object:
        serials, choices, counts, tokens = (wide.read(got, now) for wide in wides)
        alike = len(serials) == len(choices) == len(counts) and min((0, *serials, *choices, *counts)) == 0
        require(alike and sum(counts) == len(tokens), "ps", "parts of other sizes than they say", "as many tokens")
        parts, start = [], 0
        for serial, choice, count in zip(serials, choices, counts, strict=True):
            parts.append(Part(serial, choice, tokens[start : start + count]))
            start += count
        return tuple(parts)

    wides = [wholes(key, INT if key == "pt" else WIDE) for key in schema]
    return Field(schema, write, read)


def _loads() -> Field:
    """A tuple of (name of a state, how many)."""
    names, counts = texts("hn"), wholes("hc")

    def write(value: object, now: float) -> dict:
        columns = list(zip(*value, strict=True)) if value else ((), ())  # type: ignore[call-overload]
        return {k: v for f, c in zip((names, counts), columns, strict=True) for k, v in f.write(c, now).items()}

    def read(got: Mapping, now: float) -> object:
        read = names.read(got, now), counts.read(got, now)
        require(len(read[0]) == len(read[1]), "hn", "names without their counts", "as many")
        return tuple(zip(*read, strict=True))

    return Field({**names.schema, **counts.schema}, write, read)


def _news() -> Field:
    """A tuple of (key of a block, its content or None): the keys, then parents, starts and tokens of contents."""

    def write(value: object, now: float) -> dict:
        news: list = list(value)  # type: ignore[call-overload]
        contents = [content for _, content in news if content is not None]
        return {
            "bk": b"".join(key for key, _ in news),
            "bh": bytes(content is not None for _, content in news),
            "bp": b"".join(content.parent + content.start for content in contents),
            "bt": b"".join(content.tokens for content in contents),
        }

    def read(got: Mapping, now: float) -> object:
        keys, links = (_cut_alike(got[key], size) for key, size in (("bk", KEY), ("bp", 2 * KEY)))
        require(len(keys) == len(got["bh"]), "bk", f"{len(keys)} keys", "as many as there are blocks")
        require(set(got["bh"]) <= {0, 1}, "bh", "other bytes", "0 or 1")
        require(len(links) == sum(got["bh"]), "bp", f"{len(links)} contents", "as many as are said")
        size, odd = divmod(len(got["bt"]), len(links) or 1)
        require(odd == 0 and size % INT.itemsize == 0, "bt", f"{len(got['bt'])} bytes", "blocks of one size")
        contents = iter(zip(links, _cut_alike(got["bt"], size) if size else [b""] * len(links), strict=True))
        news: list[tuple[bytes, Content | None]] = []
        for key, there in zip(keys, got["bh"], strict=True):
            link, tokens = next(contents) if there else (b"", b"")
            news.append((key, Content(key, tokens, link[:KEY], link[KEY:]) if there else None))
        return tuple(news)

    return Field(dict.fromkeys(("bk", "bh", "bp", "bt"), (bytes,)), write, read)


def _cut_alike(data: bytes, size: int) -> list[bytes]:
    require(len(data) % size == 0, "b", f"{len(data)} bytes", f"a multiple of {size}")
    return [data[first : first + size] for first in range(0, len(data), size)]


def packet(version: int) -> Field:
    """A packet, and what it carries in that version."""
    return group(Packet, whole("se"), whole("nu"), whole("ak"), _message(version), holds=_numbered)


def _message(version: int) -> Field:
    """What a packet carries, or None; its number is 0 then."""

    def write(value: object, now: float) -> dict:
        kind, data = (0, None) if value is None else to_bytes(value, now, version)
        return {"mk": kind, "m": data}

    def read(got: Mapping, now: float) -> object:
        if got["m"] is None:
            return None
        carried = got["mk"] in TABLES[version] and got["mk"] < LEAST_BETWEEN
        require(carried, "mk", got["mk"], "a kind that sessions carry")
        return from_bytes(got["mk"], got["m"], now, version)

    return Field({"mk": (int,), "m": (bytes, type(None))}, write, read)


SAMPLING = group(
    Sampling,
    real("te"),
    whole("tk", -1),
    real("tp"),
    real("mp"),
    whole("se", none=True),
    real("rp"),
    real("fp"),
    real("pp"),
    pairs("lb", (WIDE, DOUBLE)),
    whole("lp", none=True),
    whole("pl", none=True),
    whole("n", 1),
)
STOPPING = group(
    Stopping, whole("mx", none=True), whole("mn"), texts("st"), wholes("si"), switch("is"), switch("ie")
)
REQUEST = group(
    Request, text("id"), wholes("pi", INT), SAMPLING, STOPPING, moment("dl"), octets("sa"), text("ad"), switch("sk")
)
SUBMIT = group(messages.Submit, REQUEST, whole("sd"), _parts())
HANDOFF, TICKET = whole("h"), octets("ki", 16)
SERIAL = whole("s")
LINE = array("lo", FLOAT), array("ra", INT), array("ti", INT, TOP), array("tl", FLOAT, TOP)
FULL = (
    array("lo", FLOAT, none=True),
    array("ra", INT, none=True),
    array("ti", INT, TOP, none=True),
    array("tl", FLOAT, TOP, none=True),
)


def _alike(value: Emission | messages.Scored) -> bool:
    """Its arrays are of one length; of the last four, all or none are there."""
    rest = [value.logprob, value.rank, value.top_ids, value.top_logprobs]
    there = [column for column in rest if column is not None]
    if isinstance(value, Emission):
        there += [value.serials, value.tokens, value.positions]
    alike = len({len(column) for column in there}) == 1
    return alike and sum(column is None for column in rest) in (0, 4)


def _numbered(packet: Packet) -> bool:
    return (packet.number == 0) == (packet.message is None)


CARRIED: Mapping[int, tuple[type, Field]] = {
    16: (messages.Submit, SUBMIT),
    17: (messages.Expect, group(messages.Expect, HANDOFF, text("so", NAME), SUBMIT, TICKET, switch("he"))),
    18: (messages.Prefill, group(messages.Prefill, HANDOFF, text("tg", NAME), REQUEST, TICKET)),
    19: (messages.Cancel, group(messages.Cancel, wholes("ss"), HANDOFF, text("re", WORDS))),
    20: (messages.Hold, group(messages.Hold, wholes("ss"), switch("hd"))),
    21: (messages.Fence, group(messages.Fence, text("ln", NAME))),
    22: (messages.Meet, group(messages.Meet, text("ln", NAME), texts("ad"), whole("tp", 1), switch("fo"))),
    23: (messages.Prefixes, group(messages.Prefixes, switch("te"), switch("fo"))),
    32: (messages.Started, group(messages.Started, SERIAL, whole("ca"))),
    33: (Emission, group(Emission, array("ss", WIDE), array("to", INT), array("po", WIDE), *FULL, holds=_alike)),
    34: (messages.Scored, group(messages.Scored, SERIAL, whole("fi"), *LINE, holds=_alike)),
    35: (messages.Over, group(messages.Over, SERIAL, text("re", WORDS), whole("to", none=True), _error())),
    36: (messages.Committed, group(messages.Committed, HANDOFF)),
    37: (messages.Failed, group(messages.Failed, HANDOFF, text("re", WORDS), _error())),
    38: (
        messages.Load,
        group(messages.Load, *(whole(f"n{k}") for k in range(9)), _loads(), *(whole(f"t{k}") for k in range(9))),
    ),
    40: (messages.Held, group(messages.Held, HANDOFF)),
    39: (messages.Blocks, group(messages.Blocks, switch("wh"), _news())),
}
BETWEEN: Mapping[int, tuple[type, Field]] = {
    48: (handoff.Fetch, group(handoff.Fetch, HANDOFF, whole("g"), whole("fi"), whole("nb"), TICKET)),
    49: (handoff.Done, group(handoff.Done, HANDOFF)),
    50: (handoff.Stop, group(handoff.Stop, HANDOFF)),
    51: (handoff.Stopped, group(handoff.Stopped, HANDOFF, text("an", NAME, one_of=ANSWERS))),
    52: (handoff.Released, group(handoff.Released, HANDOFF)),
    53: (handoff.Gone, group(handoff.Gone, HANDOFF, text("re", WORDS))),
    54: (handoff.Offer, group(handoff.Offer, HANDOFF)),
    55: (handoff.Later, group(handoff.Later, HANDOFF)),
    56: (handoff.Withdrawn, group(handoff.Withdrawn, HANDOFF, whole("g"))),
    64: (
        membership.Hello,
        group(membership.Hello, text("nm", NAME), text("ro", one_of=ROLES), texts("ad"), whole("tp", 1)),
    ),
    65: (membership.Welcome, group(membership.Welcome, text("nm", NAME), whole("se"))),
    66: (membership.Refused, group(membership.Refused, text("nm", NAME))),
    68: (membership.Line, group(membership.Line, text("li"))),
    67: (Packet, packet(1)),
}
TABLES: dict[int, Mapping[int, tuple[type, Field]]] = {1: {**CARRIED, **BETWEEN}}  # by version
KINDS = TABLES[SPOKEN.newest]
NUMBERS = {kind: number for number, (kind, _) in KINDS.items()}


def to_bytes(message: object, now: float, version: int = SPOKEN.newest) -> tuple[int, bytes]:
    """(number of its kind, its map). Raises Malformed when a reader would not take it, or not so much."""
    number = NUMBERS[type(message)]
    if number not in TABLES[version]:
        raise Malformed(f"message: got one of kind {number}, which version {version} does not have")
    data = msgpack.packb(TABLES[version][number][1].write(message, now))
    if len(data) > MAX_BYTES:
        raise Malformed(f"message: got {len(data)} bytes; expected at most {MAX_BYTES}")
    return number, data


def from_bytes(number: int, data: bytes, now: float, version: int = SPOKEN.newest) -> object:
    """The message whose bytes these are. Raises Malformed for whatever is not exactly one."""
    if number not in TABLES[version]:
        raise Malformed(f"kind: got {number}; expected a kind of message")
    kind, field = TABLES[version][number]
    return field.read(read_map(data, field.schema, kind.__name__), now)


def _cut(words: str, most: int) -> str:
    """At most `most` bytes of `words`."""
    return words.encode("utf-8", "replace")[:most].decode("utf-8", "ignore")
