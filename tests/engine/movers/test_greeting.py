"""Two ends of a connection find out whether they belong together; a secret is read from where it is safe."""

import asyncio
import contextlib
import socket

import pytest
from drawn_messages import GEOMETRY

from engine.errors import ConfigError, Malformed
from engine.movers.frames import frame
from engine.movers.greeting import MOST, OPENING, PROOF, Card, Stranger, greet, misfit, new_secret, read_secret
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
    assert both(greeting(DIALER, True), greeting(LISTENER, False)) == [LISTENER, DIALER]
    front = DIALER._replace(geometry=None)
    assert both(greeting(front, True), greeting(LISTENER, False)) == [LISTENER, front]


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
