"""The card with which a process introduces itself: who is at this end, and what its lane is.

    name, address   this process, and where it listens           wants, way   whom a dialer looks for, and for what
    geometry        of its lane's KV, where it has one           version      agreed before cards are shown

Both sides hold the cards against each other; a misfit is a sentence that each tells its operator.
"""

from typing import NamedTuple

import msgpack

from engine.errors import SeracError, wrong
from engine.movers.fields import group, text
from engine.movers.frames import SPOKEN
from engine.movers.geometry import GEOMETRY, Geometry
from engine.observe.plan_bytes import read_map

WAYS = ("control", "bulk")
NO_GEOMETRY = Geometry(1, 1, 1, "", 1, "", "", "")


class Stranger(SeracError):
    """Who is at the other end does not know the secret, may not be there, or is not whom we want."""


class Card(NamedTuple):
    """Who is at one end. `wants` and `way` are the dialer's to say; `address` is empty where nobody listens."""

    name: str
    wants: str
    way: str
    address: str
    geometry: Geometry | None
    version: int = 0  # that both agreed on; does not travel


CARDS = {  # by version
    1: group(
        Card,
        text("nm", 256),
        text("wa", 256),
        text("wy", one_of=WAYS),
        text("ad", 256),
        GEOMETRY,
        without=("version",),
    )
}


def write_card(card: Card, version: int = SPOKEN.newest) -> bytes:
    """What crosses of it."""
    filled = card if card.geometry is not None else card._replace(geometry=NO_GEOMETRY)
    return msgpack.packb(CARDS[version].write(filled, 0.0))


def read_card(data: bytes, version: int = SPOKEN.newest) -> Card:
    """The card whose bytes these are. Raises Malformed."""
    field = CARDS[version]
    card = field.read(read_map(data, field.schema, "card"), 0.0)
    assert isinstance(card, Card)
    return card._replace(geometry=None if card.geometry == NO_GEOMETRY else card.geometry, version=version)


def misfit(mine: Card, theirs: Card, dialing: bool) -> str:
    """Why these two cannot work together, as a sentence; empty where they can."""
    if not theirs.name or theirs.name == mine.name:
        return wrong("name", theirs.name, "another one than mine")
    wanted, found = (mine.wants, theirs.name) if dialing else (theirs.wants, mine.name)
    if wanted != found:
        return f"name: {found!s:.64} answers where {wanted!s:.64} was looked for; it may have started anew"
    if mine.geometry is not None and theirs.geometry is not None:
        return mine.geometry.difference(theirs.geometry)
    return ""
