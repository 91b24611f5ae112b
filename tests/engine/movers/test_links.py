"""Links between processes: what arrives is what was sent, strangers and faults disturb nobody, nothing grows."""

import asyncio
import contextlib
import os
import queue
import random
import signal
import socket
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from drawn_messages import GEOMETRY, Drawn, same
from proxy import ALL, CALM, Faults, Proxy

from engine.cluster import certs
from engine.core.handoff import Fetch, Gone, Parts
from engine.core.membership import Hello
from engine.errors import ConfigError
from engine.movers.addresses import parse
from engine.movers.cards import Card
from engine.movers.frames import frame
from engine.movers.greeting import greet, new_secret
from engine.movers.links import STRANGERS, Limits, Links
from engine.movers.parts import KIND, Heads, header_of, sums_by_head
from engine.movers.sockets import dial
from engine.movers.tls import Tls
from engine.movers.words import KINDS, to_bytes

SECRET = bytes(range(32))
HERE = Path(__file__).parent


class Ended:
    """Links with what they heard."""

    def __init__(self, name, geometry=GEOMETRY, secret=SECRET, limits=None, listen=("127.0.0.1:0",), **more):
        self.heard, self.lost = queue.Queue(), queue.Queue()
        self.links = Links(
            name, secret, lambda *heard: self.heard.put(heard), self.lost.put, geometry, limits=limits, **more
        )
        self.links.start(listen)
        self.port = int(self.links.addresses[0].rpartition(":")[2]) if listen and ":" in listen[0][5:] else 0

    def get(self, timeout=10):
        return self.heard.get(timeout=timeout)


@pytest.fixture
def made():
    """Makes links, and ends them."""
    with contextlib.ExitStack() as stack:

        def make(*arguments, **more):
            end = Ended(*arguments, **more)
            stack.callback(end.links.close)
            return end

        yield make


def until(holds, timeout=10):
    end = time.monotonic() + timeout
    while not holds():
        assert time.monotonic() < end, "it did not come to hold"
        time.sleep(0.005)


def refused(end):
    until(lambda: end.links.refusals)
    return end.links.refusals[-1]


def big_part(megabytes, number=1):
    count = 16
    layers = max(megabytes * (1 << 20) // (2 * 4 * count * 16 * 64 * 2), 1)
    geometry = GEOMETRY._replace(layers=layers, block_size=16, head_width=64)
    arrays = (np.zeros(geometry.shape(count), np.float16) for _ in range(2))
    return geometry, Parts(number, 1, 0, count, Heads(*arrays))


@pytest.mark.parametrize("address", ["127.0.0.1:0", "[::1]:0", "unix"])
def test_every_message_crosses_both_ways_as_it_was(made, address, tmp_path):
    if "::1" in address and not _has_ipv6():
        pytest.skip("no IPv6 loopback here")
    listen = f"unix:{tmp_path}/sockets/d0.sock" if address == "unix" else address
    here, there = made("p0"), made("d0", listen=[listen])
    here.links.meet("d0", there.links.addresses[0])
    drawn = Drawn(1)
    for sender, receiver, name in ((here, there, "d0"), (there, here, "p0")):
        for kind in [kind for kind, _ in KINDS.values()] + [Parts]:
            message = drawn.parts() if kind is Parts else drawn.any(kind)
            while not isinstance(message, Parts) and "at" in getattr(message, "_fields", ()):
                message = drawn.any(Hello)  # moments depend on the clock
            if _has_moment(message):
                continue
            assert sender.links.post(name, message)
            assert same(receiver.get()[1], message)


def _has_moment(message):
    inner = getattr(message, "message", None) or message
    submit = getattr(inner, "submit", inner)
    request = getattr(submit, "request", None)
    return hasattr(inner, "at") or (request is not None and request.deadline_at is not None)


def _has_ipv6():
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


def still(drawn):
    """A message without moments, which every clock changes."""
    while _has_moment(message := drawn.one()):
        pass
    return message


def test_through_a_network_with_every_fault_only_what_was_sent_arrives(made):
    """And once the faults are over everything passes again."""
    quick = Limits(retry_most_s=0.05)
    here, there = made("p0", limits=quick), made("d0", limits=quick)
    with Proxy(there.port, ALL, seed=7) as proxy, Proxy(here.port, ALL, seed=8) as back:
        here.links.meet("d0", proxy.address)
        there.links.meet("p0", back.address)
        drawn, sent = Drawn(7), {}
        for number in range(1500):
            message = still(drawn)
            sent.setdefault(_key(message), []).append(message)
            here.links.post("d0", message)
            there.links.post("p0", message)
            if number % 20 == 0:
                time.sleep(0.01)
        time.sleep(0.2)
        proxy.faults = back.faults = CALM
        arrived = 0
        for end in (here, there):
            while not end.heard.empty():
                message = end.get()[1]
                whole = message if not isinstance(message, Parts) or message.staged is not None else None
                arrived += whole is not None
                same_kind = sent[_key(message)]
                assert any(same(each, message if whole is not None else each) for each in same_kind)
        assert arrived > 100 and sum(proxy.happened.values()) > 10, (arrived, proxy.happened)
        mark = Fetch(2**40, 1, 2, 3)
        until(lambda: _passes(here, there, "d0", mark), 30)


def _key(message):
    return (type(message), *message[:4]) if isinstance(message, Parts) else type(message)


def _passes(here, there, name, mark):
    """Whether a message posted now arrives."""
    here.links.post(name, mark)
    end = time.monotonic() + 0.3
    with contextlib.suppress(queue.Empty):
        while time.monotonic() < end:
            if same(there.get(0.1)[1], mark):
                return True
    return False


@contextlib.contextmanager
def peer_process(name, *arguments):
    """(process, its address); it sends back what it hears."""
    command = [sys.executable, "peer.py", name, SECRET.hex(), *arguments]
    process = subprocess.Popen(
        command,
        cwd=HERE,
        env={**os.environ, "PYTHONPATH": str(HERE.parents[2])},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield process, process.stdout.readline().strip()
    finally:
        process.send_signal(signal.SIGCONT)
        process.stdin.close()
        process.stdout.close()
        process.wait(10)


def test_two_processes_exchange_everything_through_faults(made):
    here = made("p0", limits=Limits(retry_most_s=0.05))
    drawn = Drawn(3)
    with peer_process("d0") as (_, address), Proxy(int(address.rpartition(":")[2]), ALL, seed=3) as proxy:
        here.links.meet("d0", proxy.address)
        sent, arrived = {}, 0
        for _ in range(300):
            message = still(drawn)
            sent.setdefault(_key(message), []).append(message)
            here.links.post("d0", message)
            time.sleep(0.002)
        proxy.faults = CALM
        until(lambda: _passes_keeping(here, sent), 30)
        while not here.heard.empty():
            message = here.get()[1]
            arrived += 1
            if not isinstance(message, Parts) or message.staged is not None:
                assert any(same(each, message) for each in sent[_key(message)])
        assert arrived > 50


def _passes_keeping(here, sent):
    mark = Fetch(2**41, 1, 2, 3)
    sent.setdefault(Fetch, []).append(mark)
    before = here.heard.qsize()
    here.links.post("d0", mark)
    time.sleep(0.1)
    return here.heard.qsize() > before


# -- strangers -----------------------------------------------------------------------------------------------------


def connected(end):
    stranger = socket.create_connection(("127.0.0.1", end.port), timeout=10)
    stranger.settimeout(10)
    return stranger


def test_a_thousand_connections_of_garbage_leave_everybody_served(made):
    here, there = made("p0"), made("d0")
    here.links.meet("d0", there.links.addresses[0])
    rng = random.Random(5)
    for number in range(1000):
        with contextlib.suppress(OSError), connected(there) as stranger:
            stranger.sendall(rng.randbytes(rng.choice([0, 1, 31, 32, 33, 500, 5000])))
            if number % 4 == 0:
                stranger.shutdown(socket.SHUT_WR)
        if number % 100 == 0:
            here.links.post("d0", Fetch(number, 1, 2, 3))
            assert there.get() == ("p0", Fetch(number, 1, 2, 3))
    until(lambda: sum(there.links.counts[name] for name in ("refused", "silent", "crowded")) == 1000)
    assert there.links.counts["connected"] == 1 and there.lost.empty() and there.heard.empty()


def test_a_stranger_learns_a_nonce_and_nothing_else(made):
    there = made("d0")
    with connected(there) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" * 2)
        said = b""
        while True:
            try:
                more = stranger.recv(4096)
            except ConnectionResetError:
                break
            if not more:
                break
            said += more
    assert len(said) < 100 and b"d0" not in said and SECRET not in said
    assert "other bytes than those every frame begins with" in refused(there)


def test_bytes_that_would_run_code_elsewhere_run_nothing(made, tmp_path):
    there = made("d0")
    made_by_it = tmp_path / "made"
    order = b"cos\nsystem\n(S'touch " + bytes(made_by_it) + b"'\ntR."
    with connected(there) as stranger:
        stranger.sendall(order * 3)
        until(lambda: there.links.counts["refused"] == 1)
    assert not made_by_it.exists()


async def _insider(port, frames):
    """Prove the secret, send these frames, and wait until the connection is closed."""
    pipe = await dial(parse(f"127.0.0.1:{port}"), None)
    try:
        await greet(pipe, SECRET, Card("x0", "d0", "bulk" if frames[1] else "control", "", GEOMETRY), True)
        await pipe.send([frames[0]])
        with contextlib.suppress(EOFError, OSError):
            await asyncio.wait_for(pipe.take(1 << 20), 10)
    finally:
        pipe.close()


def test_whoever_knows_the_secret_and_talks_nonsense_loses_its_connection_alone(made):
    here, there = made("p0"), made("d0")
    here.links.meet("d0", there.links.addresses[0])
    here.links.post("d0", Fetch(0, 1, 2, 3))
    there.get()
    flipped = bytearray(frame(*to_bytes(Fetch(1, 2, 3, 4), 0.0)))
    flipped[-1] ^= 1
    part = header_of(Drawn(1).parts(), list(sums_by_head(Drawn(1).parts())))
    nonsense = {
        "no frame": (random.Random(1).randbytes(99), False),
        "a flipped bit": (bytes(flipped), False),
        "a kind that nobody knows": (frame(999, b"\x80"), False),
        "a map of another kind": (frame(17, to_bytes(Fetch(1, 2, 3, 4), 0.0)[1]), False),
        "KV where messages travel": (frame(KIND, part, 64), False),
        "a message where KV travels": (frame(*to_bytes(Fetch(1, 2, 3, 4), 0.0)), True),
        "a payload that is too large": (frame(KIND, part, 1 << 33), True),
        "a header of KV that is none": (frame(KIND, b"\x80", 64), True),
    }
    for number, (name, frames) in enumerate(nonsense.items(), 1):
        asyncio.run(_insider(there.port, frames))
        until(lambda number=number: there.links.counts["malformed"] == number)
        here.links.post("d0", Fetch(number, 1, 2, 3))
        assert there.get() == ("p0", Fetch(number, 1, 2, 3)), name
    assert here.lost.empty() and "p0" not in there.lost.queue


def test_connections_that_come_and_go_leave_nothing_behind(made):
    there = made("d0")

    def come_and_go(number):
        end = Ended(f"p{number}")
        end.links.meet("d0", there.links.addresses[0])
        end.links.post("d0", Drawn(number).parts())
        there.get()
        end.links.close()
        there.lost.get(timeout=10)
        there.links.forget(f"p{number}")

    come_and_go(0)
    until(lambda: len(there.links._tasks) == 1)
    open_files = len(os.listdir("/proc/self/fd"))
    for number in range(1, 20):
        come_and_go(number)
    until(lambda: len(there.links._tasks) == 1 and len(os.listdir("/proc/self/fd")) <= open_files)
    until(lambda: not there.links._channels and not there.links._known)


def test_strangers_who_keep_quiet_are_few_and_not_for_long(made, monkeypatch):
    monkeypatch.setattr("engine.movers.links.GREETING_S", 0.5)
    there = made("d0")
    with contextlib.ExitStack() as stack:
        for _ in range(STRANGERS + 10):
            stack.enter_context(connected(there))
        until(lambda: there.links.counts["crowded"] == 10)
        until(lambda: there.links.counts["silent"] == STRANGERS)
    here = made("p0")
    here.links.meet("d0", there.links.addresses[0])
    here.links.post("d0", Fetch(1, 2, 3, 4))
    assert there.get()[0] == "p0"


def test_another_secret_is_refused_on_both_sides(made):
    here, there = made("p0", secret=bytes.fromhex(new_secret())), made("d0")
    here.links.meet("d0", there.links.addresses[0])
    here.links.post("d0", Fetch(1, 2, 3, 4))
    assert "not of this cluster's secret" in refused(there)
    until(lambda: here.links.dropped == 1)
    assert there.heard.empty() and not there.links.counts["connected"]


def test_a_proof_cannot_be_used_again(made):
    """What a peer once said to prove itself does nothing on the next connection."""
    here, there = made("p0"), made("d0")
    said = []
    with _recording(there.port, said) as port:
        here.links.meet("d0", f"127.0.0.1:{port}")
        here.links.post("d0", Fetch(1, 2, 3, 4))
        assert there.get()[0] == "p0"
    before = there.links.counts["refused"]
    with connected(there) as stranger:
        stranger.sendall(b"".join(said))
        until(lambda: there.links.counts["refused"] == before + 1)
    assert there.heard.empty()


@contextlib.contextmanager
def _recording(port, said):
    class Recorder(Proxy):
        async def _pass_on(self, data, writer):
            if writer.get_extra_info("peername")[1] == self._port:
                said.append(bytes(data))
            await super()._pass_on(data, writer)

    with Recorder(port) as proxy:
        yield int(proxy.address.rpartition(":")[2])


def test_another_geometry_is_refused_with_a_sentence_on_both_sides(made):
    here, there = made("p0"), made("d0", GEOMETRY._replace(layers=3))
    here.links.meet("d0", there.links.addresses[0])
    here.links.post("d0", Fetch(1, 2, 3, 4))
    assert refused(here) == "geometry: layers is 3 there and 2 here; both need the same"
    assert refused(there) == "geometry: layers is 2 there and 3 here; both need the same"
    front = made("front", None)
    front.links.meet("d0", there.links.addresses[0])
    front.links.post("d0", Fetch(1, 2, 3, 4))
    assert there.get()[0] == "front", "a front has none, and joins with all"


def test_another_version_is_refused_with_a_sentence(made):
    here, there = made("p0"), made("d0")
    said = frame(1, b"", version=2)
    with connected(there) as old:
        old.sendall(said)
        assert "protocol version 2; expected 1" in refused(there)
    assert here.links.refusals == there.links.refusals.__class__([], 16)


def test_whoever_answers_under_another_name_is_refused(made):
    here, there = made("p0"), made("d0.2")
    here.links.meet("d0.1", there.links.addresses[0])
    here.links.post("d0.1", Fetch(1, 2, 3, 4))
    assert refused(here) == "name: d0.2 answers where d0.1 was looked for; it may have started anew"
    assert there.heard.empty()


# -- peers that end, stall or do not read --------------------------------------------------------------------------


def test_a_peer_that_ends_is_noticed_at_once_and_its_next_life_is_met(made):
    here = made("p0")
    there = Ended("d0")
    here.links.meet("d0", there.links.addresses[0])
    here.links.post("d0", Fetch(1, 2, 3, 4))
    there.get()
    began = time.monotonic()
    there.links.close()
    assert here.lost.get(timeout=5) == "d0" and time.monotonic() - began < 1.0
    again = made("d0", listen=[there.links.addresses[0]])
    until(lambda: _passes(here, again, "d0", Fetch(5, 6, 7, 8)))


def test_who_gets_kv_can_answer_a_peer_that_listens_nowhere(made):
    here, there = made("p0", listen=[]), made("d0")
    here.links.meet("d0", there.links.addresses[0])
    here.links.post("d0", Drawn(1).parts())
    sender, part = there.get()
    there.links.post(sender, Fetch(part.handoff, 1, 2, 3))
    assert here.get() == ("d0", Fetch(part.handoff, 1, 2, 3))


def test_a_peer_that_nobody_knows_costs_what_was_posted(made):
    here = made("p0")
    for _ in range(5):
        here.links.post("nobody", Fetch(1, 2, 3, 4))
    until(lambda: here.links.dropped == 5)
    assert here.links.waiting_bytes("nobody") == 0


def test_a_stopped_process_holds_bounded_memory_and_goes_on_later(made, monkeypatch):
    monkeypatch.setattr("engine.movers.connection.SILENT", 1000)  # a busy machine may take long over this
    geometry, part = big_part(1)
    size = 1 << 20
    here = made("p0", limits=Limits(control_bytes=100_000, bulk_bytes=8 * size))
    with peer_process("d0") as (process, address):
        here.links.meet("d0", address)
        here.links.post("d0", Fetch(1, 2, 3, 4))
        assert here.get() == ("d0", Fetch(1, 2, 3, 4))
        process.send_signal(signal.SIGSTOP)
        most = full = 0
        while full < 200:  # in a row: the buffers of the kernel are full too
            here.links.post("d0", part)
            full = 0 if here.links.post("d0", Gone(1, "x" * 4000)) else full + 1
            most = max(most, here.links.waiting_bytes("d0"))
            time.sleep(0.001 if full else 0)
        assert 90_000 + 7 * size < most <= 100_000 + 8 * size and here.links.dropped >= 200
        process.send_signal(signal.SIGCONT)
        until(lambda: here.heard.qsize() > 20)
        assert here.lost.empty()
    assert here.lost.get(timeout=5) == "d0"


def test_a_network_that_swallows_everything_and_does_not_tell_is_noticed(made, monkeypatch):
    monkeypatch.setattr("engine.movers.connection.BEAT_S", 0.05)
    here, there = made("p0"), made("d0")
    with Proxy(there.port) as proxy:
        here.links.meet("d0", proxy.address)
        here.links.post("d0", Fetch(1, 2, 3, 4))
        there.get()
        time.sleep(0.5)
        assert here.lost.empty() and there.lost.empty(), "an idle connection stays"
        proxy.faults = Faults(mute=1.0)
        assert here.lost.get(timeout=5) == "d0" and there.lost.get(timeout=5) == "p0"
        proxy.faults = CALM
        until(lambda: _passes(here, there, "d0", Fetch(5, 6, 7, 8)))


def test_bytes_that_come_one_at_a_time_do_not_hold_a_connection_for_ever(made, monkeypatch):
    monkeypatch.setattr("engine.movers.links.GREETING_S", 0.3)
    there = made("d0")
    with connected(there) as slow:
        began = time.monotonic()
        with contextlib.suppress(OSError):
            while time.monotonic() - began < 5:
                slow.sendall(b"S")
                time.sleep(0.02)
                if there.links.counts["silent"] + there.links.counts["refused"]:
                    break
        assert time.monotonic() - began < 2


def test_large_parts_do_not_hold_up_control_messages(made):
    """256 MiB of KV on its way; a message still goes there and back in a moment."""
    geometry, part = big_part(16)
    here, there = made("p0", geometry), made("d0", geometry)
    here.links.meet("d0", there.links.addresses[0])
    here.links.post("d0", Fetch(0, 1, 2, 3))
    there.get()
    parts, waits = 0, []
    for number in range(16):
        assert here.links.post("d0", part._replace(handoff=number))
    while parts < 16:
        began = time.monotonic()
        here.links.post("d0", Fetch(9, 1, 2, 3))
        while isinstance(there.get(30)[1], Parts):
            parts += 1
        waits.append(time.monotonic() - began)
    waits.sort()
    print(f"control behind 256 MiB: median {waits[len(waits) // 2] * 1e3:.1f} ms, worst {waits[-1] * 1e3:.1f} ms")
    assert waits[len(waits) // 2] < 0.2 and waits[-1] < 2.0


def test_a_peer_that_never_pauses_does_not_starve_the_others(made):
    flood, here, there = made("p0"), made("p1"), made("d0")
    for each in (flood, here):
        each.links.meet("d0", there.links.addresses[0])
    here.links.post("d0", Fetch(0, 1, 2, 3))
    there.get()
    many = 20_000
    for number in range(many):
        flood.links.post("d0", Fetch(number, 1, 2, 3))
    until(lambda: there.heard.qsize() > 10)
    here.links.post("d0", Fetch(0, 1, 2, 3))
    until(lambda: there.heard.qsize() > many, 60)
    senders = [there.get()[0] for _ in range(many + 1)]
    assert senders.index("p1") < many - 1000


def test_what_came_damaged_is_delivered_without_blocks(made):
    here, there = made("p0"), made("d0")

    class Flips(Proxy):
        async def _pass_on(self, data, writer):
            if len(data) > 1000:
                data[-1] ^= 1
            await super()._pass_on(data, writer)

    with Flips(there.port) as proxy:
        here.links.meet("d0", proxy.address)
        part = Drawn(1).parts()
        here.links.post("d0", part)
        assert same(there.get()[1], part._replace(staged=None))
        assert there.links.counts["damaged"] == 1


# -- where one may listen ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("address", ["0.0.0.0:0", "[::]:0", "192.0.2.1:7000", "example.org:80"])
def test_an_address_beyond_this_machine_needs_tls(address):
    links = Links("p0", SECRET, lambda *heard: None, lambda peer: None)
    for use in (lambda: links.start([address]), lambda: links.meet("d0", address)):
        with pytest.raises(ConfigError, match="not loopback, without TLS"):
            use()
    links.close()


@pytest.mark.parametrize(
    "address", ["", "nothing", "unix:relative", "host:port", "127.0.0.1:70000", "unix:/" + "x" * 200]
)
def test_what_is_no_address_is_refused(address):
    links = Links("p0", SECRET, lambda *heard: None, lambda peer: None)
    with pytest.raises(ConfigError, match="address: got"):
        links.meet("d0", address)
    links.close()


def test_with_tls_everything_crosses_and_who_has_no_certificate_does_not(made, tmp_path):
    certs.init(tmp_path / "certs", "prod", [], datetime.now(UTC))
    tls = Tls(tmp_path / "certs" / "lane")
    geometry, part = big_part(4)
    here, there = made("p0", geometry, tls=tls), made("d0", geometry, tls=tls)
    here.links.meet("d0", there.links.addresses[0])
    for message in (Fetch(1, 2, 3, 4), part):
        here.links.post("d0", message)
        assert same(there.get()[1], message)
    there.links.post("p0", part)
    assert same(here.get()[1], part)
    plain = made("p1", geometry)
    plain.links.meet("d0", there.links.addresses[0])
    plain.links.post("d0", Fetch(1, 2, 3, 4))
    until(lambda: plain.links.dropped == 1)
    assert there.heard.empty() and there.links.counts["connected"] == 2


def test_a_directory_that_others_may_enter_is_refused(tmp_path):
    tmp_path.chmod(0o755)
    links = Links("p0", SECRET, lambda *heard: None, lambda peer: None)
    with pytest.raises(ConfigError, match="chmod 700"):
        links.start([f"unix:{tmp_path}/p0.sock"])
    links.close()


def test_the_socket_of_a_dead_process_is_replaced_and_that_of_a_live_one_is_not(made, tmp_path):
    path = tmp_path / "sockets" / "d0.sock"
    first = made("d0", listen=[f"unix:{path}"])
    with pytest.raises(ConfigError, match="cannot listen there"):
        Ended("d1", listen=[f"unix:{path}"])
    first.links.close()
    assert not path.exists()
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    second = made("d0", listen=[f"unix:{path}"])
    assert second.links.addresses == (f"unix:{path}",)
