"""How two processes of a cluster recognise each other on a new connection, and tell a stranger.

    dialer                                   listener
      Opening(nonce, versions)  -------->  <--------  Opening(nonce, versions)      none in common: both close
      Proof(mac, card)  ---------------->    right?  no: closed without a word
        right?  <------------------------  Proof(mac, card)
      both: do the cards fit?  no: Turned(sentence), closed        yes: the connection serves

mac = HMAC-SHA256 under the cluster's secret of the side's role, both openings and the card. The secret never
crosses, a proof is good for one connection and cannot be sent back to its maker, and nobody between can talk two
sides down to an older version. What cards say is in engine/movers/cards.py.

`greeting` has the steps, and knows no socket; `greet` takes them over a `Pipe`, `greet_blocking` over a socket.
On an address that is not loopback all of this happens inside TLS, which is what keeps others from reading along.
"""

import hmac
import os
import secrets
import socket
import time
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import NamedTuple

import msgpack

from engine.errors import ConfigError, Malformed
from engine.movers.cards import Card, Stranger, misfit, read_card, write_card
from engine.movers.fields import Field, group, octets, text, whole
from engine.movers.frames import GREETING, PREFIX, SPOKEN, Versions, check_header, frame, read_prefix
from engine.movers.pipe import Pipe
from engine.movers.private import private
from engine.observe.plan_bytes import read_map

OPENING, PROOF, TURNED = 1, 2, 3
MOST = 4096  # bytes of a frame from somebody who has proved nothing
NONCE = SECRET = 32
MAC = 32
MOST_VERSION = (1 << 16) - 1


class Opening(NamedTuple):
    nonce: bytes
    newest: int
    oldest: int


class Proof(NamedTuple):
    mac: bytes
    card: bytes


class Turned(NamedTuple):
    reason: str


OPENINGS = group(
    Opening,
    octets("no", NONCE),
    whole("vn", 1, MOST_VERSION),
    whole("vo", 1, MOST_VERSION),
    holds=lambda it: len(it.nonce) == NONCE and it.oldest <= it.newest,  # type: ignore[attr-defined]
)
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
        if not private(found):
            raise ConfigError(f"{variable}_FILE: others may read it; take their rights away (chmod 600)")
    try:
        secret = bytes.fromhex(words.strip())
    except ValueError:
        secret = b""
    if len(secret) != SECRET:
        raise ConfigError(f"{variable}: got no secret; expected {2 * SECRET} hexadecimal digits, here or in a file")
    return secret


Steps = Generator[bytes | int, bytes, Card]  # yields bytes to send, or how many it wants to read


async def greet(pipe: Pipe, secret: bytes, mine: Card, dialing: bool, speaks: Versions = SPOKEN) -> Card:
    """Prove to each other that both know `secret`; the other's card, which fits ours.

    Raises Malformed, Stranger, or EOFError and OSError of the connection. The caller limits the time.
    """
    steps = greeting(secret, mine, dialing, speaks)
    answer: bytes | None = None
    while True:
        try:
            wanted = steps.send(answer)  # type: ignore[arg-type]
        except StopIteration as done:
            return done.value
        if isinstance(wanted, int):
            answer = bytes(await pipe.take(wanted))
        else:
            await pipe.send([wanted])
            answer = None


def greet_blocking(
    connected: socket.socket, secret: bytes, mine: Card, dialing: bool, timeout_s: float, speaks: Versions = SPOKEN
) -> Card:
    """The same over a socket that blocks, plain or TLS, in at most `timeout_s`; reads no byte beyond the greeting.

    Raises Malformed, Stranger, EOFError or OSError (TimeoutError); the caller closes it then.
    """
    ends_at, before = time.monotonic() + timeout_s, connected.gettimeout()
    steps = greeting(secret, mine, dialing, speaks)
    answer: bytes | None = None
    while True:
        try:
            wanted = steps.send(answer)  # type: ignore[arg-type]
        except StopIteration as done:
            connected.settimeout(before)
            return done.value
        if isinstance(wanted, int):
            answer = _take(connected, wanted, ends_at)
        else:
            connected.settimeout(_left_s(ends_at))
            connected.sendall(wanted)
            answer = None


def _take(connected: socket.socket, count: int, ends_at: float) -> bytes:
    found = bytearray()
    while len(found) < count:
        connected.settimeout(_left_s(ends_at))
        if not (data := connected.recv(count - len(found))):
            raise EOFError("the other side has ended")
        found += data
    return bytes(found)


def _left_s(ends_at: float) -> float:
    if (left := ends_at - time.monotonic()) <= 0:
        raise TimeoutError("the greeting took too long")
    return left


def greeting(secret: bytes, mine: Card, dialing: bool, speaks: Versions = SPOKEN) -> Steps:
    """One side of a greeting, whatever carries its bytes. Raises Malformed and Stranger."""
    first = _pack(OPENINGS, Opening(secrets.token_bytes(NONCE), *speaks))
    yield frame(OPENING, first, version=GREETING)
    second = yield from _hear(OPENING)
    version = _agreed(speaks, second)
    card = write_card(mine, version)
    openings = first + second if dialing else second + first
    proof = _framed(PROOF, Proof(_mac(secret, dialing, openings, card), card))
    if dialing:
        yield proof
    other = _read(PROOF, (yield from _hear(PROOF)))
    assert isinstance(other, Proof)
    if not hmac.compare_digest(other.mac, _mac(secret, not dialing, openings, other.card)):
        raise Stranger("greeting: got a proof that is not of this cluster's secret")
    if not dialing:
        yield proof
    return (yield from _compare(mine, read_card(other.card, version), dialing))


def _agreed(speaks: Versions, opening: bytes) -> int:
    """The version that both sides speak; neither goes on without one, and both know why."""
    theirs = _read(OPENING, opening)
    assert isinstance(theirs, Opening)
    version = speaks.agreed(Versions(theirs.newest, theirs.oldest))
    if version is None:
        raise Stranger(
            f"protocol: got versions {theirs.oldest} to {theirs.newest} there and {speaks.oldest} to "
            f"{speaks.newest} here; expected one in common: go over to a new release one step at a time"
        )
    return version


def _compare(mine: Card, theirs: Card, dialing: bool) -> Steps:
    """Both sides compare, and each says what it found, so that both can tell their operator."""
    reason = misfit(mine, theirs, dialing)
    yield _framed(TURNED, Turned(reason))
    answer = _read(TURNED, (yield from _hear(TURNED)))
    assert isinstance(answer, Turned)
    if reason or answer.reason:
        raise Stranger(reason or answer.reason)
    return theirs


def _hear(kind: int) -> Generator[int, bytes, bytes]:
    """The header of the next frame."""
    prefix = read_prefix((yield PREFIX), MOST, 0, GREETING)
    header = yield prefix.header
    check_header(prefix, header)
    if prefix.kind != kind:
        raise Malformed(f"greeting: got a frame of kind {prefix.kind}; expected {kind}")
    return header


def _framed(kind: int, what: NamedTuple) -> bytes:
    return frame(kind, _pack(SCHEMAS[kind], what), version=GREETING)


def _read(kind: int, header: bytes) -> object:
    return SCHEMAS[kind].read(read_map(header, SCHEMAS[kind].schema, "greeting"), 0.0)


def _pack(field: Field, value: object) -> bytes:
    return msgpack.packb(field.write(value, 0.0))


def _mac(secret: bytes, dialing: bool, openings: bytes, card: bytes) -> bytes:
    role = b"serac dialer" if dialing else b"serac listener"
    return hmac.digest(secret, role + openings + card, "sha256")
