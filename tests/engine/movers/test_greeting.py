"""Two ends of a connection find out whether they belong together; a secret is read from where it is safe."""

import asyncio
import contextlib
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import msgpack
import pytest
from drawn_messages import GEOMETRY

from engine.errors import ConfigError, Malformed
from engine.movers.cards import CARDS, Card, misfit
from engine.movers.frames import LAYOUT, PREFIX, Versions, frame
from engine.movers.greeting import (
    MOST,
    OPENING,
    PROOF,
    Stranger,
    greet,
    greet_blocking,
    new_secret,
    read_secret,
)
from engine.movers.greeting import greeting as steps
from engine.movers.pipe import Pipe, PlainWire

SECRET = bytes(range(32))
DIALER = Card("p0.1", "d0.1", "bulk", "127.0.0.1:7", GEOMETRY)
LISTENER = Card("d0.1", "", "control", "unix:/a/b", GEOMETRY)


def both(dialer, listener):
    """What two coroutines with a connection between them return or raise; it ends with the first that fails."""

    async def one(end, coroutine):
        pipe = Pipe(PlainWire(end))
        try:
            return await asyncio.wait_for(coroutine(pipe), 5)
        except (Stranger, Malformed, EOFError, OSError) as error:
            return error
        finally:
            pipe.close()

    async def run():
        ends = socket.socketpair()
        return await asyncio.gather(one(ends[0], dialer), one(ends[1], listener))

    return asyncio.run(run())


def greeting(card, dialing, secret=SECRET):
    return lambda pipe: greet(pipe, secret, card, dialing)


def test_each_gets_the_others_card():
    agreed = [card._replace(version=1) for card in (LISTENER, DIALER)]
    assert both(greeting(DIALER, True), greeting(LISTENER, False)) == agreed
    front = DIALER._replace(geometry=None)
    assert both(greeting(front, True), greeting(LISTENER, False)) == [agreed[0], front._replace(version=1)]


def over_sockets(*sides):
    """What each of two functions with an end of a connection returns or raises; the first to fail ends it."""

    def one(end, side):
        with end:
            try:
                return side(end)
            except (Stranger, Malformed, EOFError, OSError) as error:
                return error

    ends = socket.socketpair()
    with ThreadPoolExecutor(2) as pool:
        return [each.result(5) for each in [pool.submit(one, *pair) for pair in zip(ends, sides, strict=True)]]


def test_over_sockets_that_block_the_greeting_is_the_same_and_takes_no_byte_beyond():
    def side(card, dialing, secret=SECRET):
        def greets(end):
            found = greet_blocking(end, secret, card, dialing, 2.0)
            end.sendall(b"more")
            assert end.gettimeout() is None
            return found, end.recv(9)

        return greets

    at_dialer, at_listener = over_sockets(side(DIALER, True), side(LISTENER, False))
    assert at_dialer == (LISTENER._replace(version=1), b"more")
    assert at_listener == (DIALER._replace(version=1), b"more")
    at_dialer, at_listener = over_sockets(side(DIALER, True, bytes(32)), side(LISTENER, False))
    assert isinstance(at_listener, Stranger) and isinstance(at_dialer, (EOFError, OSError))
    for found in over_sockets(side(DIALER._replace(wants="d0.2"), True), side(LISTENER, False)):
        assert isinstance(found, Stranger) and "d0.2 was looked for" in str(found)


def test_who_dribbles_is_not_waited_for_longer_than_was_said():
    """Each byte comes in time; all together they do not."""

    def dribble(end):
        for _ in range(40):
            end.sendall(b"S")
            time.sleep(0.02)

    def greets(end):
        began = time.monotonic()
        with pytest.raises(TimeoutError):
            greet_blocking(end, SECRET, LISTENER, False, 0.2)
        return time.monotonic() - began

    assert over_sockets(dribble, greets)[1] < 0.5


def test_without_a_version_in_common_both_sides_say_so_before_any_proof():
    def side(card, dialing, speaks):
        return lambda pipe: greet(pipe, SECRET, card, dialing, speaks)

    new, old = side(DIALER, True, Versions(3, 2)), side(LISTENER, False, Versions(1, 1))
    found = both(new, old)
    assert all(isinstance(each, Stranger) for each in found)
    assert "got versions 1 to 1 there and 2 to 3 here" in str(found[0])
    assert "got versions 2 to 3 there and 1 to 1 here; expected one in common" in str(found[1])


def pump(dialer, listener, between):
    """Take the steps of both sides in turns; `between` may change what crosses. What each returns or raises."""
    sides, left = (dialer, listener), [b"", b""]
    wanted, found = [next(dialer), next(listener)], [None, None]
    while None in found:
        before = list(wanted)
        for here, side in enumerate(sides):
            try:
                while found[here] is None and not isinstance(wanted[here], int):
                    left[1 - here] += between(wanted[here])
                    wanted[here] = side.send(None)
                while found[here] is None and isinstance(wanted[here], int) and len(left[here]) >= wanted[here]:
                    count = wanted[here]
                    data, left[here] = left[here][:count], left[here][count:]
                    wanted[here] = side.send(data)
            except StopIteration as done:
                found[here] = done.value
            except (Stranger, Malformed) as error:
                found[here] = error
        if wanted == before:
            break
    return found


def test_nobody_between_can_talk_two_sides_down_to_an_older_version():
    """Both proofs cover both openings as they were sent."""

    def older(said):
        kind, header = LAYOUT.unpack_from(said)[2], msgpack.unpackb(said[PREFIX:])
        return frame(kind, msgpack.packb(header | {"vn": 1})) if kind == OPENING else said

    def sides():
        return [
            steps(SECRET, card, dialing, Versions(9, 1)) for card, dialing in ((DIALER, True), (LISTENER, False))
        ]

    cards = {9: CARDS[1], 1: CARDS[1]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engine.movers.cards.CARDS", cards)
        assert [card.version for card in pump(*sides(), lambda said: said)] == [9, 9]
        assert isinstance(pump(*sides(), older)[1], Stranger)


@pytest.mark.parametrize("wrong", ["dialer", "listener"])
def test_who_does_not_know_the_secret_gets_no_proof(wrong):
    secrets = {side: bytes.fromhex(new_secret()) if side == wrong else SECRET for side in ("dialer", "listener")}
    at_dialer, at_listener = both(
        greeting(DIALER, True, secrets["dialer"]), greeting(LISTENER, False, secrets["listener"])
    )
    assert isinstance(at_listener, Stranger) and isinstance(at_dialer, (EOFError, OSError))


def test_a_proof_sent_back_to_its_maker_proves_nothing():
    """Each side's proof names its role, so an echo is no answer."""

    async def echo(pipe):
        with contextlib.suppress(EOFError):
            while True:
                await pipe.some()
                await pipe.send([await pipe.take(pipe._stop - pipe._start)])

    found, _ = both(greeting(DIALER, True), echo)
    assert isinstance(found, Stranger) and "not of this cluster's secret" in str(found)


@pytest.mark.parametrize(
    "said",
    [frame(PROOF, b"\x80"), frame(OPENING, b"\x80"), frame(OPENING, b"x" * (MOST + 1)), frame(OPENING, b"", 5)],
)
def test_frames_out_of_turn_or_size_are_refused(said):
    async def say(pipe):
        await pipe.send([said])
        await pipe.take(1 << 10)

    assert isinstance(both(say, greeting(LISTENER, False))[1], Malformed)


def test_what_does_not_fit_is_named():
    assert misfit(DIALER, LISTENER, True) == "" == misfit(LISTENER, DIALER, False)
    assert "another one than mine" in misfit(DIALER, LISTENER._replace(name="p0.1"), True)
    assert "d0.2 answers where d0.1 was looked for" in misfit(DIALER, LISTENER._replace(name="d0.2"), True)
    assert "d0.1 answers where d0.9 was looked for" in misfit(LISTENER, DIALER._replace(wants="d0.9"), False)
    other = LISTENER._replace(geometry=GEOMETRY._replace(revision="w2"))
    assert misfit(DIALER, other, True) == "geometry: revision is w2 there and weights-1 here; both need the same"


def test_a_secret_comes_from_the_environment_or_from_a_file_of_its_owner(tmp_path):
    words, path = new_secret(), tmp_path / "secret"
    assert len(words) == 64 and words != new_secret()
    assert read_secret({"SERAC_CLUSTER_SECRET": words}) == bytes.fromhex(words)
    path.write_text(words + "\n")
    path.chmod(0o600)
    assert read_secret({"SERAC_CLUSTER_SECRET_FILE": str(path)}) == bytes.fromhex(words)
    path.chmod(0o640)
    with pytest.raises(ConfigError, match="chmod 600"):
        read_secret({"SERAC_CLUSTER_SECRET_FILE": str(path)})
    with pytest.raises(ConfigError, match="cannot be read"):
        read_secret({"SERAC_CLUSTER_SECRET_FILE": str(tmp_path / "nothing")})
    for bad in ({}, {"SERAC_CLUSTER_SECRET": "abc"}, {"SERAC_CLUSTER_SECRET": words[:-2]}):
        with pytest.raises(ConfigError, match="expected 64 hexadecimal digits") as raised:
            read_secret(bad)
        assert "abc" not in str(raised.value), "no message holds a secret"
