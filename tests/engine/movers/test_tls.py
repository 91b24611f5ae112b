"""TLS between processes: who shows the right certificate is served, all others are told why, and nobody is hurt."""

import asyncio
import contextlib
import logging
import os
import queue
import random
import shutil
import socket
import ssl
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest

from engine.cluster import certs
from engine.core.handoff import Fetch, Parts
from engine.errors import ConfigError
from engine.movers.cards import Card, Stranger
from engine.movers.geometry import Geometry
from engine.movers.greeting import greet_blocking
from engine.movers.links import Links
from engine.movers.parts import Heads
from engine.movers.tls import ACCEPTS, Identity, Tls, role_of
from engine.movers.tls_wire import RECORD, secure

SECRET = bytes(range(32))
NOW = datetime.now(UTC)
LONG_AGO = NOW - timedelta(days=400)
SAID = Fetch(1, 2, 3, 4)


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    """Folders: of the cluster, of one of the same name with another authority, and of one that has ended."""
    folder = tmp_path_factory.mktemp("certs")
    for name, now in (("prod", NOW), ("foreign", NOW), ("expired", LONG_AGO)):
        certs.init(folder / name, "prod", [], now)
    # The ended one is of the same authority, and so is one that says another role.
    key = certs.serialization.load_pem_private_key((folder / "prod" / "ca" / "key.pem").read_bytes(), None)
    authority = certs._read(folder / "prod" / "ca" / "ca.pem"), key
    for name, uri, now in (("ended", "serac://prod/lane", LONG_AGO), ("roleless", "https://prod/lane", NOW)):
        certs._issue(folder / name, uri, [], authority, now)
    certs._issue(folder / "other", "serac://test/lane", [], authority, NOW)
    selfmade = folder / "selfmade"
    shutil.copytree(folder / "foreign" / "ca", selfmade)
    shutil.copy(selfmade / "ca.pem", selfmade / "cert.pem")
    return folder


@pytest.fixture
def made():
    """Makes links, and ends them."""
    with contextlib.ExitStack() as stack:

        def make(name, tls, listen=("127.0.0.1:0",)):
            heard = queue.Queue()
            links = Links(name, SECRET, lambda *said: heard.put(said), lambda peer: None, tls=tls)
            links.start(listen)
            stack.callback(links.close)
            links.heard = heard
            return links

        yield make


def until(holds, timeout=5):
    end = time.monotonic() + timeout
    while not holds():
        assert time.monotonic() < end, "it did not come to hold"
        time.sleep(0.005)


def serves(links, dialer):
    """A neighbour is still heard."""
    dialer.meet(links.name, links.addresses[0])
    assert dialer.post(links.name, SAID)
    assert links.heard.get(timeout=5) == (dialer.name, SAID)


def both(tls_dialer, tls_listener, after=lambda side, dialing: role_of(side)):
    """What the two ends of a connection return or raise, over sockets that block."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def one(dialing):
            end = socket.create_connection(listener.getsockname()) if dialing else listener.accept()[0]
            try:
                with (tls_dialer if dialing else tls_listener).wrap(end, dialing, 3.0) as side:
                    return after(side, dialing)
            except (Stranger, EOFError, OSError) as error:
                return error

        with ThreadPoolExecutor(2) as pool:
            return [each.result(10) for each in [pool.submit(one, dialing) for dialing in (True, False)]]


@pytest.mark.parametrize("dialer", certs.ROLES)
@pytest.mark.parametrize("listener", certs.ROLES)
def test_who_connects_where_is_decided_by_the_roles_of_both_and_both_are_told(there, dialer, listener):
    ends = [Tls(there / "prod" / role) for role in (dialer, listener)]
    at_dialer, at_listener = both(*ends)
    if dialer in ACCEPTS[listener]:
        assert (at_dialer, at_listener) == (Identity("prod", listener), Identity("prod", dialer))
    else:
        assert isinstance(at_dialer, Stranger) and isinstance(at_listener, Stranger)
        assert str(at_dialer) == str(at_listener) and f"{dialer} that connects to a" in str(at_dialer)


def test_fronts_take_lanes_and_operators_and_lanes_take_fronts_and_lanes():
    assert ACCEPTS == {"front": ("lane", "operator"), "lane": ("front", "lane"), "operator": ()}
    assert set(ACCEPTS) == set(certs.ROLES)


def test_a_socket_that_blocks_is_greeted_over_tls_as_over_plain(there):
    tls = Tls(there / "prod" / "lane")
    cards = Card("p0", "p1", "control", "", None), Card("p1", "", "control", "", None)

    def greets(side, dialing):
        found = greet_blocking(side, SECRET, cards[0 if dialing else 1], dialing, 3.0)
        side.sendall(b"step")
        return found.name, side.recv(16), side.version()

    assert both(tls, tls, greets) == [("p1", b"step", "TLSv1.3"), ("p0", b"step", "TLSv1.3")]


def test_who_keeps_quiet_in_a_handshake_is_not_waited_for_longer_than_was_said(there):
    ours, theirs = socket.socketpair()
    with theirs:
        began = time.monotonic()
        with pytest.raises(TimeoutError):
            Tls(there / "prod" / "lane").wrap(ours, False, 0.1)
        assert time.monotonic() - began < 1
        assert theirs.recv(9) == b"", "it was not closed"


def context(folder, side):
    """What somebody has who does not use our code, and checks nothing."""
    found = ssl.SSLContext(side)
    found.check_hostname, found.verify_mode = False, ssl.CERT_NONE
    if folder is not None:
        found.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    return found


REFUSED = {
    "expired": ("ended", "certificate has expired"),
    "of another authority": ("foreign/lane", "certificate is refused: "),
    "signed by itself": ("selfmade", "self-signed certificate"),
    "of no role": ("roleless", "certificate says no role in this cluster"),
    "of another cluster": ("other", "certificate says no role in this cluster"),
    "of a role that may not": ("prod/front", "got a front that connects to a front; it takes lanes and operators"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_wrong_certificate_is_refused_with_a_sentence_and_the_neighbour_is_served(there, made, what):
    name, sentence = REFUSED[what]
    front, lane = made("front", Tls(there / "prod" / "front")), made("p0", Tls(there / "prod" / "lane"))
    serves(front, lane)
    port = int(front.addresses[0].rpartition(":")[2])
    wrong = context(there / name, ssl.PROTOCOL_TLS_CLIENT)
    raw = socket.create_connection(("127.0.0.1", port), 5)
    with raw, contextlib.suppress(OSError), wrong.wrap_socket(raw) as wrapped:
        while wrapped.recv(1 << 10):
            pass
    until(lambda: front.counts["refused"] == 1)
    assert sentence in front.refusals[-1]
    serves(front, lane)


@pytest.mark.parametrize("what", set(REFUSED) - {"of a role that may not"})
def test_a_listener_with_a_wrong_certificate_is_refused_by_who_dials(there, made, what):
    name, sentence = REFUSED[what]
    with imposter(
        lambda raw: context(there / name, ssl.PROTOCOL_TLS_SERVER).wrap_socket(raw, server_side=True)
    ) as at:
        lane = made("p0", Tls(there / "prod" / "lane"))
        lane.meet("front", at)
        lane.post("front", SAID)
        until(lambda: lane.refusals)
    assert sentence in lane.refusals[-1]


@contextlib.contextmanager
def imposter(answer):
    """Listens and does `answer` with each that comes; yields the address."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def work():
            with contextlib.suppress(OSError):
                while True:
                    raw = listener.accept()[0]
                    with raw, contextlib.suppress(OSError), answer(raw) as wrapped:
                        wrapped.recv(1 << 10)

        thread = threading.Thread(target=work)
        thread.start()
        try:
            yield f"127.0.0.1:{listener.getsockname()[1]}"
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


def test_who_shows_no_certificate_is_refused_and_both_are_told(there, made):
    front, lane = made("front", Tls(there / "prod" / "front")), made("p0", Tls(there / "prod" / "lane"))
    port = int(front.addresses[0].rpartition(":")[2])
    bare = context(None, ssl.PROTOCOL_TLS_CLIENT)
    with (
        pytest.raises(ssl.SSLError, match="CERTIFICATE_REQUIRED"),
        socket.create_connection(("127.0.0.1", port)) as raw,
        bare.wrap_socket(raw) as wrapped,
    ):
        wrapped.recv(1 << 10)
    until(lambda: front.refusals)
    assert front.refusals[-1] == "tls: the other side showed no certificate"
    serves(front, lane)


def test_a_dialer_is_told_that_its_certificate_was_refused(there, made):
    """The alert comes when its own handshake is long over."""
    foreign, tls = context(there / "prod" / "front", ssl.PROTOCOL_TLS_SERVER), Tls(there / "prod" / "front")
    foreign.load_verify_locations(there / "foreign" / "lane" / "ca.pem")
    foreign.verify_mode = ssl.CERT_REQUIRED
    tls._loaded = tls._loaded._replace(server=foreign)
    front, lane = made("front", tls), made("p0", Tls(there / "prod" / "lane"))
    lane.meet("front", front.addresses[0])

    def told():
        lane.post("front", SAID)
        return lane.refusals

    until(told)
    assert lane.refusals[-1] == "tls: the other side does not know the authority of our certificate"
    assert lane.counts["unreachable"] == 0
    until(lambda: front.refusals)
    assert "certificate is refused" in front.refusals[-1]


def test_older_tls_is_refused(there, made):
    front, lane = made("front", Tls(there / "prod" / "front")), made("p0", Tls(there / "prod" / "lane"))
    old = context(there / "prod" / "lane", ssl.PROTOCOL_TLS_CLIENT)
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    port = int(front.addresses[0].rpartition(":")[2])
    with pytest.raises(ssl.SSLError), socket.create_connection(("127.0.0.1", port)) as raw, old.wrap_socket(raw):
        pass
    until(lambda: front.refusals)
    assert "older versions of TLS; expected TLS 1.3" in front.refusals[-1]
    serves(front, lane)


def test_plain_text_into_a_tls_port_and_tls_into_a_plain_port_are_refused_with_a_sentence(there, made):
    front, lane = made("front", Tls(there / "prod" / "front")), made("p0", Tls(there / "prod" / "lane"))
    plain, other = made("d0", None), made("d1", None)
    plain.meet("front", front.addresses[0])
    plain.post("front", SAID)
    until(lambda: front.refusals)
    assert front.refusals[-1] == "tls: got bytes that are not TLS; give certificates to both sides"
    lane.meet("d0", plain.addresses[0])
    lane.post("d0", SAID)
    until(lambda: lane.refusals and plain.counts["refused"])
    assert lane.refusals[-1] == "tls: got bytes that are not TLS; give certificates to both sides"
    assert any("got other bytes than those every frame begins with" in each for each in plain.refusals)
    serves(front, lane)
    serves(plain, other)


def test_a_hundred_bad_handshakes_leave_no_descriptor_behind(there, made):
    front, lane = made("front", Tls(there / "prod" / "front")), made("p0", Tls(there / "prod" / "lane"))
    serves(front, lane)
    port, rng = int(front.addresses[0].rpartition(":")[2]), random.Random(3)
    wrong = context(there / "foreign" / "lane", ssl.PROTOCOL_TLS_CLIENT)
    before = len(os.listdir("/proc/self/fd"))
    for number in range(100):
        with socket.create_connection(("127.0.0.1", port), 5) as raw, contextlib.suppress(OSError):
            if number % 2:
                raw.sendall(rng.randbytes(rng.randrange(400)))
            else:
                wrong.wrap_socket(raw).close()
    until(lambda: len(os.listdir("/proc/self/fd")) <= before)
    serves(front, lane)


# -- files ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(there, tmp_path):
    """A lane's own, to be spoiled."""
    return shutil.copytree(there / "prod" / "lane", tmp_path / "lane")


def spoil(folder, there, what):
    if what == "mode":
        (folder / "key.pem").chmod(0o640)
    elif what == "gone":
        (folder / "cert.pem").unlink()
    else:
        source, name = what
        shutil.copy(there / source / name, folder / name)


BROKEN = {
    "mode": "others may read .*key.pem; take their rights away",
    "gone": "cert.pem cannot be read; expected a folder of serac certs init",
    ("prod/front", "key.pem"): "holds no certificate with its own key .KEY_VALUES_MISMATCH",
    ("ended", "cert.pem"): "holds no certificate with its own key",
    ("foreign/lane", "ca.pem"): "cert.pem is refused: ",
}


@pytest.mark.parametrize("what", BROKEN)
def test_files_that_cannot_be_used_are_refused_before_anything_starts(folder, there, what):
    spoil(folder, there, what)
    with pytest.raises(ConfigError, match=BROKEN[what]) as raised:
        Tls(folder)
    assert raised.value.exit_code == 2


@pytest.mark.parametrize(("name", "words"), [("ended", "cert.pem is refused: certificate has expired"),
                                             ("roleless", "cert.pem has no role")])  # fmt: skip
def test_an_expired_certificate_and_one_without_a_role_are_named(there, name, words):
    with pytest.raises(ConfigError, match=words):
        Tls(there / name)


def test_what_ends_soon_is_logged(there, caplog):
    Tls(there / "prod" / "lane", lambda: NOW.timestamp() + 300 * 86400)
    assert not caplog.messages
    tls = Tls(there / "prod" / "lane", lambda: NOW.timestamp() + 350 * 86400)
    assert caplog.messages == ["the certificate of lane ends in 14 days; serac certs renew"]
    assert abs(tls.ends_s - NOW.timestamp() - 365 * 86400) < 2


def test_after_reload_new_connections_take_the_new_files_and_broken_ones_change_nothing(
    there, tmp_path, made, caplog
):
    folder = tmp_path / "prod"
    shutil.copytree(there / "prod", folder)
    mine = Tls(folder / "front")
    front, lane = made("front", mine), made("p0", Tls(there / "prod" / "lane"))
    serves(front, lane)
    serial = lambda: shown(front.addresses[0], there / "prod" / "lane")  # noqa: E731
    before = serial()
    certs.renew(folder, NOW)
    assert serial() == before, "nobody asked for the new files"
    assert mine.reload() and serial() != before and front.counts["connected"] == 1
    renewed = serial()
    for what in BROKEN:
        shutil.copytree(folder / "front", folder / "kept")
        spoil(folder / "front", there, what)
        with caplog.at_level(logging.ERROR):
            caplog.clear()
            assert not mine.reload() and serial() == renewed
        assert len(caplog.messages) == 1 and "the certificates stay as they were" in caplog.messages[0]
        shutil.rmtree(folder / "front")
        (folder / "kept").rename(folder / "front")
    shutil.rmtree(folder / "front")
    shutil.copytree(folder / "lane", folder / "front")
    assert not mine.reload() and mine.role == "front" and serial() == renewed
    serves(front, lane)


def shown(address, folder):
    """The serial number of the certificate that a listener shows."""
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), 5) as raw:
        client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        client.check_hostname = False
        client.load_cert_chain(folder / "cert.pem", folder / "key.pem")
        client.load_verify_locations(folder / "ca.pem")
        with client.wrap_socket(raw) as wrapped:
            return wrapped.getpeercert()["serialNumber"]


# -- bytes ---------------------------------------------------------------------------------------------------------


def test_bytes_of_all_sizes_come_as_they_went_through_a_narrow_socket(there):
    """Both ways at once, so that records wait for room in the middle."""
    tls = {True: Tls(there / "prod" / "lane"), False: Tls(there / "prod" / "front")}
    rng = random.Random(5)
    sizes = [1, RECORD - 1, RECORD, RECORD + 1, 3 << 20, *(int(2 ** rng.uniform(0, 18)) for _ in range(60))]
    said = [rng.randbytes(size) for size in sizes]

    async def one(end, dialing):
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            end.setsockopt(socket.SOL_SOCKET, option, 1 << 16)
        pipe = await secure(end, tls[dialing], dialing)

        async def write():
            batch = deque(said)
            while batch:
                await pipe.send([batch.popleft() for _ in range(min(len(batch), 7))])

        writing = asyncio.create_task(write())
        heard = [bytes(await pipe.take(size)) for size in sizes]
        await writing
        pipe.close()
        return heard

    async def run():
        with socket.create_server(("127.0.0.1", 0)) as listener:
            dialed = socket.create_connection(listener.getsockname())
            return await asyncio.gather(one(dialed, True), one(listener.accept()[0], False))

    assert asyncio.run(asyncio.wait_for(run(), 20)) == [said, said]


def test_kv_goes_on_over_a_new_connection_when_a_key_has_had_its_share(there, monkeypatch):
    monkeypatch.setattr("engine.movers.tls_wire.MOST_SENT", 1 << 20)
    geometry, heard = Geometry(16, 2, 64, "float16", 16, "", ""), queue.Queue()
    part = Parts(1, 1, 0, 16, Heads(*(np.zeros(geometry.shape(16), np.float16) for _ in range(2))))
    tls = Tls(there / "prod" / "lane")
    here, far = (
        Links(name, SECRET, lambda *said: heard.put(said), lambda peer: None, geometry, tls=tls) for name in "ab"
    )
    with contextlib.closing(here), contextlib.closing(far):
        here.start()
        far.start(["127.0.0.1:0"])
        here.meet("b", far.addresses[0])
        for _ in range(6):  # each 2 MiB, so that every second is lost and asked for again
            here.post("b", part)
            with contextlib.suppress(queue.Empty):
                heard.get(timeout=0.2)
        here.post("b", SAID)
        assert heard.get(timeout=5) == ("a", SAID)
        assert here.counts["connected"] > 2 and far.counts["malformed"] == 0


def test_the_end_of_the_other_side_is_an_end_and_changed_bytes_are_an_error(there):
    tls = Tls(there / "prod" / "lane")

    async def run(change):
        near, far = socket.socketpair(), socket.socketpair()
        for each in (*near, *far):
            each.setblocking(False)
        passing = asyncio.create_task(pass_on(near[1], far[1], change))
        back = asyncio.create_task(pass_on(far[1], near[1], lambda data: data))
        try:
            # socketpair is of the unix family, which TLS takes as any other
            sending, taking = await asyncio.gather(secure(near[0], tls, True), secure(far[0], tls, False))
            change.armed = True
            await sending.send([b"x" * 100])
            sending.close()
            return bytes(await taking.take(100)), await taking.take(1)
        finally:
            taking.close()
            for task in (passing, back):
                task.cancel()
            await asyncio.gather(passing, back, return_exceptions=True)
            for each in (near[1], far[1]):
                each.close()

    def flip(data):
        return data[:-1] + bytes([data[-1] ^ 1]) if getattr(flip, "armed", False) else data

    def keep(data):
        return data

    with pytest.raises(EOFError):
        asyncio.run(run(keep))
    with pytest.raises(ssl.SSLError):
        asyncio.run(run(flip))


async def pass_on(source, to, change):
    loop = asyncio.get_running_loop()
    while data := await loop.sock_recv(source, 1 << 16):
        await loop.sock_sendall(to, change(data))
    to.shutdown(socket.SHUT_WR)
