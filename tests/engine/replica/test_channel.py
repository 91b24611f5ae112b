"""Two ends of a lane's channel in one process: orders keep their order, and whoever falls silent is noticed."""

import contextlib
import os
import queue
import socket
import ssl
import threading
import time
from datetime import UTC, datetime

import pytest

from engine.cluster import certs
from engine.errors import GroupLost
from engine.movers.frames import frame
from engine.replica import channel as module
from engine.replica import orders
from engine.replica.channel import SILENT, Channel
from engine.replica.orders import to_frame

BEAT_S = 0.05
SILENT_S = SILENT * BEAT_S


@pytest.fixture(params=["unix", "tcp"])
def sockets(request):
    """Two connected sockets."""
    if request.param == "unix":
        made = socket.socketpair()
    else:
        with socket.create_server(("127.0.0.1", 0)) as door:
            made = socket.create_connection(door.getsockname()), door.accept()[0]
    yield made
    for each in made:
        each.close()


@pytest.fixture
def ends(sockets, monkeypatch):
    """Makes channels of connected sockets, with fast beats."""
    monkeypatch.setattr(module, "BEAT_S", BEAT_S)
    made = []

    def make(*which):
        made.extend(Channel(each, f"peer {len(made)}") for each in which)
        return made[-len(which) :]

    yield make
    for each in made:
        each.close()


def lost(channel):
    """How long until it is noticed, and the words for it."""
    began = time.monotonic()
    with pytest.raises(GroupLost) as caught:
        channel.receive()
    return time.monotonic() - began, str(caught.value)


def test_orders_arrive_in_the_order_that_they_were_said(ends, sockets):
    leader, follower = ends(*sockets)
    said = [orders.Born("p0.a"), orders.Gather(tuple(range(50_000))), orders.Reset(), orders.Go()]
    said += [orders.Drop(1, 2, k) for k in range(300)]
    saying = threading.Thread(target=lambda: [leader.say(order) for order in said])
    saying.start()
    assert repr([follower.receive() for _ in said]) == repr(said), "tuples of two kinds may be equal"
    saying.join()
    follower.say(orders.Unable("é"))
    assert leader.receive() == orders.Unable("é")


def test_what_several_threads_say_at_once_does_not_mix(ends, sockets):
    leader, follower = ends(*sockets)

    def talk(who):
        for k in range(400):
            leader.say(orders.Drawn(who, k))
            leader.say(orders.Gather(tuple(range(40_000 if k % 50 == 0 else 1))))

    threads = [threading.Thread(target=talk, args=(who,)) for who in range(4)]
    for thread in threads:
        thread.start()
    heard = []
    while len(heard) < 4 * 800:
        heard.append(follower.receive())
    for thread in threads:
        thread.join()
    drawn = [order for order in heard if isinstance(order, orders.Drawn)]
    assert all([each.digest for each in drawn if each.number == who] == list(range(400)) for who in range(4))


def test_beats_keep_a_quiet_channel_alive(ends, sockets):
    leader, follower = ends(*sockets)
    later = threading.Timer(3 * SILENT_S, leader.say, [orders.Go()])
    later.start()
    assert repr(follower.receive()) == "Go()"
    later.join()


def test_a_peer_that_says_nothing_is_lost_in_the_time_that_the_constants_say(ends, sockets):
    (leader,) = ends(sockets[0])
    took, words = lost(leader)
    assert SILENT_S * 0.9 < took < 3 * SILENT_S and words.startswith("peer 0 has said nothing for")
    assert module.SILENT * 0.5 == 3.0, "the seconds that RELIABILITY.md states"


def test_half_an_order_is_silence_too(ends, sockets):
    (leader,) = ends(sockets[0])
    sockets[1].send(to_frame(orders.Drawn(1, 2))[:-3])
    took, words = lost(leader)
    assert took < 3 * SILENT_S and "said nothing" in words


def test_an_order_in_small_pieces_arrives(ends, sockets):
    (leader,) = ends(sockets[0])

    def trickle():
        for k in range(0, len(data), 7):
            sockets[1].send(data[k : k + 7])
            time.sleep(BEAT_S / 5)

    data = to_frame(orders.Here("so far")) + to_frame(orders.Drawn(3, 4))
    thread = threading.Thread(target=trickle)
    thread.start()
    assert [leader.receive(), leader.receive()] == [orders.Here("so far"), orders.Drawn(3, 4)]
    thread.join()


@pytest.mark.parametrize("how", ["close", "shutdown", "channel"])
def test_an_end_is_noticed_at_once(ends, sockets, how):
    leader, follower = ends(*sockets)
    {
        "close": lambda: (follower.close(), sockets[1].close()),
        "shutdown": lambda: sockets[1].shutdown(socket.SHUT_WR),
        "channel": follower.close,
    }[how]()
    took, words = lost(leader)
    assert took < SILENT_S and "has ended" in words or "is gone" in words


def test_a_channel_that_was_closed_here_tells_its_reader(ends, sockets):
    leader, _ = ends(*sockets)
    found = queue.Queue()
    thread = threading.Thread(target=lambda: found.put(lost(leader)))
    thread.start()
    leader.close()
    thread.join()
    assert found.get()[0] < SILENT_S


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\nHost: there\r\n\r\n",
        frame(80, b"\x80"),
        frame(138, b"\x81\xa1a\x01"),
        frame(138, b"\x80", 5),
    ],
)
def test_nonsense_ends_the_channel_with_a_sentence(ends, sockets, data):
    (leader,) = ends(sockets[0])
    sockets[1].send(data + bytes(64))
    took, words = lost(leader)
    assert took < SILENT_S and "said what is no order of this lane" in words
    assert "GET" not in words
    sockets[1].settimeout(5)
    while sockets[1].recv(1 << 16):
        """Beats, until it has ended there too."""


def test_a_peer_that_reads_nothing_holds_nobody_for_longer_than_the_time_for_it(ends, sockets, monkeypatch):
    monkeypatch.setattr(module, "STUCK_S", 0.3)
    (leader,) = ends(sockets[0])
    large, began = orders.Gather(tuple(range(300_000))), time.monotonic()
    for _ in range(8):
        leader.say(large)
    assert 0.2 < time.monotonic() - began < 3.0, "what is said after its end costs no time"
    assert lost(leader)[0] < SILENT_S


def test_a_peer_that_reads_slowly_is_waited_for(ends, sockets, monkeypatch):
    monkeypatch.setattr(module, "STUCK_S", 0.3)
    (leader,) = ends(sockets[0])
    large = orders.Gather(tuple(range(200_000)))
    data, beat, found = to_frame(large), to_frame(orders.Beat()), bytearray()

    def read():
        while len(found) < len(data):
            found.extend(sockets[1].recv(1 << 16))
            time.sleep(0.04)

    thread = threading.Thread(target=read)
    thread.start()
    leader.say(large)
    thread.join(20)
    assert not thread.is_alive() and found.replace(beat, b"")[: len(data) - len(beat)] == data[: -len(beat)]


def test_beats_are_none_of_what_is_received(ends, sockets):
    (leader,) = ends(sockets[0])
    sockets[1].send(to_frame(orders.Beat()) * 3 + to_frame(orders.Go()))
    assert repr(leader.receive()) == "Go()"


@pytest.fixture
def secured(tmp_path):
    """Two ends of one TLS connection through a pipe that lets bytes pass in pieces, and the size of these."""
    certs.init(tmp_path / "c", "prod", [], datetime.now(UTC))
    role = tmp_path / "c" / "lane"
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    server.load_cert_chain(role / "cert.pem", role / "key.pem")
    client.check_hostname, client.verify_mode = False, ssl.CERT_NONE
    near, near_pipe = socket.socketpair()
    far, far_pipe = socket.socketpair()
    size = [1 << 16]

    def copy(source, target):
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                for k in range(0, len(data), size[0]):
                    target.send(data[k : k + size[0]])
                    time.sleep(0.001)
            target.shutdown(socket.SHUT_WR)

    pipes = [threading.Thread(target=copy, args=pair) for pair in ((near_pipe, far_pipe), (far_pipe, near_pipe))]
    for pipe in pipes:
        pipe.start()
    made = queue.Queue()
    threading.Thread(target=lambda: made.put(server.wrap_socket(far, server_side=True))).start()
    ends = client.wrap_socket(near), made.get(timeout=10)
    yield *ends, size
    for each in (*ends, near_pipe, far_pipe):
        with contextlib.suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)
    for pipe in pipes:
        pipe.join()
    for each in (*ends, near_pipe, far_pipe):
        each.close()


def test_a_record_of_tls_that_comes_in_many_pieces_is_not_silence(ends, secured):
    near, far, size = secured
    leader, follower = ends(near, far)
    size[0] = 300
    large = orders.Here(os.urandom(2000).hex())
    leader.say(large)
    assert follower.receive() == large
    size[0] = 1 << 16
    many = [orders.Gather(tuple(range(20_000))), orders.Go()]
    for order in many:
        leader.say(order)
    assert [follower.receive() for _ in many] == many
    follower.say(orders.Drawn(1, 1))
    assert leader.receive() == orders.Drawn(1, 1)
