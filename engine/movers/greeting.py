"""How two processes of a cluster recognise each other on a new connection, and tell a stranger.

    dialer                                   listener
      Opening(nonce)  ------------------>  <------------------  Opening(nonce)
      Proof(mac, card)  ---------------->    right?  no: closed without a word
        right?  <------------------------  Proof(mac, card)
      both: do the cards fit?  no: Turned(sentence), closed        yes: the connection serves

mac = HMAC-SHA256 under the cluster's secret of the side's role, both nonces and the card. The secret never crosses,
a proof is good for one connection, and cannot be sent back to its maker. A card says who is at this end, whom the
dialer wants, where this process listens and the geometry of its lane.
On an address that is not loopback all of this happens inside TLS, which is what keeps others from reading along.
"""

import hmac
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import msgpack

from engine.errors import ConfigError, Malformed, SeracError, wrong
from engine.movers.fields import group, octets, text
from engine.movers.frames import PREFIX, check_header, frame, read_prefix
from engine.movers.geometry import GEOMETRY, Geometry
from engine.movers.pipe import Pipe
from engine.observe.plan_bytes import read_map

OPENING, PROOF, TURNED = 1, 2, 3
MOST = 4096  # bytes of a frame from somebody who has proved nothing
NONCE = SECRET = 32
MAC = 32
WAYS = ("control", "bulk")


class Card(NamedTuple):
    """Who is at one end. `wants` and `way` are the dialer's to say; `address` is empty where nobody listens."""

    name: str
    wants: str
    way: str
    address: str
    geometry: Geometry | None


class Opening(NamedTuple):
    nonce: bytes


class Proof(NamedTuple):
    mac: bytes
    card: bytes


class Turned(NamedTuple):
    reason: str


class Stranger(SeracError):
    """Who is at the other end does not know the secret, or is not whom we want."""


NO_GEOMETRY = Geometry(1, 1, 1, "", 1, "", "", "")
CARD = group(Card, text("nm", 256), text("wa", 256), text("wy", one_of=WAYS), text("ad", 256), GEOMETRY)
OPENINGS = group(Opening, octets("no", NONCE), holds=lambda it: len(it.nonce) == NONCE)  # type: ignore[attr-defined]
PROOFS = group(Proof, octets("ma", MAC), octets("ca", MOST))
TURNS = group(Turned, text("re", MOST))
SCHEMAS = {OPENING: OPENINGS, PROOF: PROOFS, TURNED: TURNS}


def new_secret() -> str:
    """A secret for a cluster, as text for a file or the environment."""
    return secrets.token_hex(SECRET)


def read_secret(environment: Mapping[str, str], variable: str = "SERAC_CLUSTER_SECRET") -> bytes:
    """The secret in `variable`, or in the file that `variable`_FILE names. Raises ConfigError."""
    words = environment.get(variable, "")
    if not words and (path := environment.get(f"{variable}_FILE", "")):
        try:
            found = os.stat(path)
            words = Path(path).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{variable}_FILE: cannot be read ({type(error).__name__})") from None
        if found.st_mode & 0o077:
            raise ConfigError(f"{variable}_FILE: others may read it; take their rights away (chmod 600)")
    try:
        secret = bytes.fromhex(words.strip())
    except ValueError:
        secret = b""
    if len(secret) != SECRET:
        raise ConfigError(f"{variable}: got no secret; expected {2 * SECRET} hexadecimal digits, here or in a file")
    return secret


async def greet(pipe: Pipe, secret: bytes, mine: Card, dialing: bool) -> Card:
    """Prove to each other that both know `secret`; the other's card, which fits ours.

    Raises Malformed, Stranger, or EOFError and OSError of the connection. The caller limits the time.
    """
    nonce, card = secrets.token_bytes(NONCE), _pack(CARD, _unfilled(mine))
    await _say(pipe, OPENING, Opening(nonce))
    theirs = await _hear(pipe, OPENING)
    assert isinstance(theirs, Opening)
    nonces = nonce + theirs.nonce if dialing else theirs.nonce + nonce
    proof = Proof(_mac(secret, dialing, nonces, card), card)
    if dialing:
        await _say(pipe, PROOF, proof)
    other = await _hear(pipe, PROOF)
    assert isinstance(other, Proof)
    if not hmac.compare_digest(other.mac, _mac(secret, not dialing, nonces, other.card)):
        raise Stranger("greeting: got a proof that is not of this cluster's secret")
    if not dialing:
        await _say(pipe, PROOF, proof)
    return await _compare(pipe, mine, read_card(other.card), dialing)


def read_card(data: bytes) -> Card:
    """The card whose bytes these are. Raises Malformed."""
    card = CARD.read(read_map(data, CARD.schema, "card"), 0.0)
    assert isinstance(card, Card)
    return card._replace(geometry=None) if card.geometry == NO_GEOMETRY else card


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


async def _compare(pipe: Pipe, mine: Card, theirs: Card, dialing: bool) -> Card:
    """Both sides compare, and each says what it found, so that both can tell their operator."""
    reason = misfit(mine, theirs, dialing)
    await _say(pipe, TURNED, Turned(reason))
    answer = await _hear(pipe, TURNED)
    assert isinstance(answer, Turned)
    if reason or answer.reason:
        raise Stranger(reason or answer.reason)
    return theirs


async def _say(pipe: Pipe, kind: int, what: NamedTuple) -> None:
    await pipe.send([frame(kind, _pack(SCHEMAS[kind], what))])


async def _hear(pipe: Pipe, kind: int) -> object:
    prefix = read_prefix(await pipe.take(PREFIX), MOST, 0)
    header = bytes(await pipe.take(prefix.header))
    check_header(prefix, header)
    if prefix.kind != kind:
        raise Malformed(f"greeting: got a frame of kind {prefix.kind}; expected {kind}")
    return SCHEMAS[kind].read(read_map(header, SCHEMAS[kind].schema, "greeting"), 0.0)


def _unfilled(card: Card) -> Card:
    return card if card.geometry is not None else card._replace(geometry=NO_GEOMETRY)


def _pack(field, value: object) -> bytes:
    return msgpack.packb(field.write(value, 0.0))


def _mac(secret: bytes, dialing: bool, nonces: bytes, card: bytes) -> bytes:
    role = b"serac dialer" if dialing else b"serac listener"
    return hmac.digest(secret, role + nonces + card, "sha256")
