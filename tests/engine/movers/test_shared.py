"""KV through memory that two processes share: it is what was sent, slots come back, no failure spreads.

Every segment here is small, so that it is full soon.
"""

import asyncio
import contextlib
import gc
import os
import queue
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from drawn_messages import GEOMETRY, Drawn, same

from engine.core.handoff import Fetch, Parts
from engine.movers import shared
from engine.movers.addresses import parse
from engine.movers.arena import Arena
from engine.movers.cards import Card
from engine.movers.frames import frame
from engine.movers.greeting import greet
from engine.movers.links import Limits, Links
from engine.movers.parts import Heads, header_of, num_bytes, sums_by_head
from engine.movers.pipe import PlainWire
from engine.movers.shared import FREED, LEND, PLACE, PLACED, SIZE, WANT, Shared
from engine.movers.sockets import dial

SECRET = bytes(range(32))
HERE = Path(__file__).parent
ROOM = 1 << 16


class End:
    """Links at a unix socket, with what they heard."""

    def __init__(self, name, folder, shared_bytes=ROOM):
        self.heard, self.name = queue.Queue(), name
        self.links = Links(
            name,
            SECRET,
            lambda *heard: self.heard.put(heard),
            lambda peer: None,
            GEOMETRY,
            limits=Limits(shared_bytes=shared_bytes),
        )
        self.links.start([f"unix:{folder}/sockets/{name}.sock"])

    def get(self, timeout=10):
        return self.heard.get(timeout=timeout)[1]

    @property
    def counts(self):
        return self.links.counts

    def arena(self, peer):
        (channel,) = [each for key, each in self.links._channels.items() if key == (peer, "bulk")]
        return channel.connections[-1].shared.arena


@pytest.fixture
def made(tmp_path):
    """Makes ends, and ends them."""
    with contextlib.ExitStack() as stack:

        def make(name, **more):
            end = End(name, tmp_path, **more)
            stack.callback(end.links.close)
            return end

        yield make


@pytest.fixture
def pair(made):
    """Two that know each other, after the first part has opened the way through memory."""
    here, there = made("p0"), made("d0")
    opened(here, there)
    return here, there


def opened(here, there, count="shared"):
    here.links.meet(there.name, there.links.addresses[0])
    until(lambda: here.links.post(there.name, part(0)) and there.get() and here.counts[count] > 0)
    until(lambda: count != "shared" or len(here.arena(there.name).slots) == 0)


def lends_nothing(here, there):
    opened(here, there, "unlent")
    here.links.post("d0", part(3))
    assert same(there.get(), part(3)) and here.counts["unlent"] == 1 and not here.counts["shared"]


def until(holds, timeout=10):
    end = time.monotonic() + timeout
    while not holds():
        assert time.monotonic() < end, "it did not come to hold"
        time.sleep(0.005)


def part(number, blocks=8):
    """`blocks` times 1024 bytes."""
    rng = np.random.default_rng(number)
    arrays = (rng.integers(0, 1 << 15, GEOMETRY.shape(blocks), np.uint16).view(np.float16) for _ in range(2))
    return Parts(number, 1, 0, blocks, Heads(*arrays))


# -- the way through -----------------------------------------------------------------------------------------------


def test_parts_of_every_size_cross_both_ways_as_they_were(pair):
    here, there = pair
    opened(there, here)
    before = here.counts["shared"] + there.counts["shared"]
    drawn = [part(number, blocks) for number, blocks in enumerate((1, 7, 32))] + [Drawn(7).parts()]
    for sender, receiver in ((here, there), (there, here)):
        for each in drawn:
            assert sender.links.post(receiver.name, each)
            assert same(receiver.get(), each)
    assert here.counts["shared"] + there.counts["shared"] == before + 2 * len(drawn)


def test_the_first_part_lies_in_memory_already(made):
    here, there = made("p0"), made("d0")
    here.links.meet("d0", there.links.addresses[0])
    here.links.post("d0", part(1))
    assert same(there.get(), part(1)) and here.counts["shared"] == 1 and here.counts["unshared"] == 0


def test_who_is_never_asked_for_memory_waits_once(made, monkeypatch):
    monkeypatch.setattr(shared, "ASKED_S", 0.3)
    monkeypatch.setattr(Shared, "_want", lambda self, header: None)
    here, there = made("p0"), made("d0")
    here.links.meet("d0", there.links.addresses[0])
    began = time.monotonic()
    for number in range(20):
        here.links.post("d0", part(number))
        assert same(there.get(), part(number))
    assert 0.3 < time.monotonic() - began < 3.0 and not here.counts["shared"]


def test_what_comes_lies_in_the_memory_and_cannot_be_written(pair):
    here, there = pair
    sent = part(1)
    here.links.post("d0", sent)
    keys, values, _ = there.get().staged
    arena = here.arena("d0")
    assert arena.room(0, num_bytes(sent)).tobytes() == keys.tobytes() + values.tobytes()
    arena.room(0, 1)[:] ^= 1
    assert not np.array_equal(keys, sent.staged[0]), "no copy was made"
    for array in (keys, values):
        with pytest.raises(ValueError, match="cannot set WRITEABLE"):
            array.setflags(write=True)


def test_shards_that_are_cut_out_of_larger_arrays_cross_as_one(pair):
    here, there = pair
    sent = part(2)
    room = [np.pad(each, [(0, 0), (0, 0), (0, 3), (0, 0), (0, 0)])[:, :, :8] for each in sent.staged[:2]]
    cut = [Heads(*(each[heads] for each in room), heads.start) for heads in (slice(0, 1), slice(1, None))]
    here.links.post("d0", sent._replace(staged=cut))
    assert same(there.get(), sent) and here.counts["unshared"] == 0


def test_a_part_without_blocks_crosses(pair):
    here, there = pair
    here.links.post("d0", Parts(1, 2, 3, 4, None))
    assert there.get() == Parts(1, 2, 3, 4, None)


def test_a_part_larger_than_the_memory_goes_through_the_socket(made):
    here, there = made("p0", shared_bytes=8192), made("d0")
    opened(here, there)
    for number, (blocks, count) in enumerate([(9, "unshared"), (8, "shared"), (32, "unshared")]):
        before = here.counts[count]
        here.links.post("d0", part(number, blocks))
        assert same(there.get(), part(number, blocks)) and here.counts[count] == before + 1


def test_when_the_memory_is_full_parts_go_through_the_socket_until_slots_come_back(pair):
    here, there = pair
    size = num_bytes(part(0))
    fit, held = ROOM // size, []
    before = here.counts["shared"]
    for number in range(fit + 5):
        here.links.post("d0", part(number))
        held.append(there.get())
        assert same(held[-1], part(number))
    assert here.counts["shared"] == before + fit and here.counts["unshared"] == 5
    assert here.arena("d0").take(size) is None
    assert all(same(each, part(number)) for number, each in enumerate(held)), "nothing was written over"
    del held[3], held[0]
    until(lambda: len(here.arena("d0").slots) == fit - 2)
    for number in (90, 91, 92):
        here.links.post("d0", part(number))
        held.append(there.get())
        assert same(held[-1], part(number))
    assert here.counts["shared"] == before + fit + 2 and here.counts["unshared"] == 6
    assert same(held[0], part(1)) and same(held[2], part(4))


def test_slots_come_back_in_any_order(pair):
    here, there = pair
    rng, held = np.random.default_rng(5), {}
    for number in range(300):
        if len(held) == 6:
            del held[rng.choice(list(held))]
        here.links.post("d0", part(number))
        held[number] = there.get()
        here.arena("d0").slots.check()
    assert all(same(each, part(number)) for number, each in held.items())
    held.clear()
    until(lambda: len(here.arena("d0").slots) == 0)
    assert here.counts["unshared"] == 0


def test_a_reader_that_holds_all_slots_costs_each_further_part_no_wait(pair, monkeypatch):
    here, there = pair
    monkeypatch.setattr(shared, "SOCKET_RATE", num_bytes(part(0)) / 0.3)
    held = []
    for number in range(ROOM // num_bytes(part(0))):
        here.links.post("d0", part(number))
        held.append(there.get())
    began = time.monotonic()
    for number in range(20):
        here.links.post("d0", part(number))
        there.get()
    assert 0.25 < time.monotonic() - began < 3.0, "the first waits in vain, the others know"


def test_a_writer_waits_for_a_slot_once_one_came_back_and_not_where_it_waited_in_vain(pair, monkeypatch):
    here, there = pair
    fit, held = ROOM // num_bytes(part(0)), []

    def cross(number):
        here.links.post("d0", part(number))
        held.append(there.get())
        return here.counts["unshared"]

    def waits_for_room(number):
        """The memory is full, and a minute may be waited."""
        monkeypatch.setattr(shared, "SOCKET_RATE", num_bytes(part(0)) / 60)
        here.links.post("d0", part(number))
        with pytest.raises(queue.Empty):
            there.get(0.1)
        del held[0]
        held.append(there.get())
        assert same(held[-1], part(number))

    for number in range(fit):
        assert cross(number) == 0
    waits_for_room(50)
    monkeypatch.setattr(shared, "SOCKET_RATE", 1e9)
    assert cross(51) == 1, "in vain"
    monkeypatch.setattr(shared, "SOCKET_RATE", 1.0)
    assert cross(52) == 2, "at once"
    del held[0]
    until(lambda: len(here.arena("d0").slots) == fit - 1)
    assert cross(53) == 2
    waits_for_room(54)
    assert here.counts["unshared"] == 2


# -- what goes wrong -----------------------------------------------------------------------------------------------


def test_a_damaged_byte_in_the_memory_is_noticed(pair, monkeypatch):
    here, there = pair
    copy = Shared._copy

    async def flips(self, sent, arena, offset):
        await copy(self, sent, arena, offset)
        arena.room(offset + 5, offset + 6)[:] ^= 1

    monkeypatch.setattr(Shared, "_copy", flips)
    here.links.post("d0", part(1))
    assert same(there.get(), part(1)._replace(staged=None)) and there.counts["damaged"] == 1
    monkeypatch.undo()
    here.links.post("d0", part(1))
    assert same(there.get(), part(1))
    until(lambda: len(here.arena("d0").slots) == 0)


def test_arrays_outlive_their_connection_and_its_end_is_no_trouble(made):
    here, there = made("p0"), made("d0")
    opened(here, there)
    held = []
    for number in range(3):
        here.links.post("d0", part(number))
        held.append(there.get())
    here.links.close()
    until(lambda: there.counts["ended"] >= 2)
    assert all(same(each, part(number)) for number, each in enumerate(held))
    del held[1]
    gc.collect()
    again = made("p1")
    opened(again, there)
    again.links.post("d0", part(9))
    assert same(there.get(), part(9)) and same(held[1], part(2))
    there.links.close()
    assert same(held[0], part(0))
    held.clear()  # a loop that has ended is told nothing


def test_a_connection_that_is_closed_lends_nothing_more():
    async def closed_while_it_waits():
        counts = Counter()
        ended = Shared(ROOM, GEOMETRY, counts)
        lending = asyncio.create_task(ended.lend())
        await asyncio.sleep(0)
        ended.heard(WANT, b"\1", None)
        ended.close()
        return await lending, await ended.lend(), ended.arena, counts

    assert asyncio.run(closed_while_it_waits()) == (None, None, None, {})


def test_connections_that_come_and_go_leave_no_descriptor_behind(made):
    there = made("d0")

    def come_and_go(number):
        here = made(f"p{number}")
        opened(here, there)
        here.links.close()
        there.links.forget(here.name)

    come_and_go(0)
    until(lambda: len(there.links._tasks) == 1)
    gc.collect()
    gc.disable()  # nothing waits for it
    try:
        before = len(os.listdir("/proc/self/fd"))
        for number in range(1, 10):
            come_and_go(number)
        until(lambda: len(os.listdir("/proc/self/fd")) <= before)
    finally:
        gc.enable()


def test_a_system_without_such_memory_uses_sockets_and_counts_that(made, monkeypatch):
    monkeypatch.delattr(os, "memfd_create")
    here, there = made("p0"), made("d0")
    lends_nothing(here, there)


def test_a_system_that_has_no_such_memory_left_uses_sockets_and_counts_that(made, monkeypatch):
    def none_left(size):
        raise OSError(12, "none left")

    monkeypatch.setattr(shared, "Arena", none_left)
    here, there = made("p0"), made("d0")
    lends_nothing(here, there)


def test_a_system_that_has_no_memory_left_for_pages_sends_this_part_through_the_socket(pair, monkeypatch):
    here, there = pair

    def none_left(*_):
        raise OSError(28, "none left")

    monkeypatch.setattr(os, "posix_fallocate", none_left)
    here.links.post("d0", part(3, 32))
    assert same(there.get(), part(3, 32)) and here.counts["unshared"] == 1
    here.links.post("d0", part(4))
    assert same(there.get(), part(4)) and here.counts["unshared"] == 1, "it fits the pages that are there"
    until(lambda: len(here.arena("d0").slots) == 0)


def test_a_system_that_passes_no_descriptors_uses_sockets_and_counts_that(made, monkeypatch):
    async def refuses(self, data, descriptor):
        return False

    monkeypatch.setattr(PlainWire, "hand", refuses)
    here, there = made("p0"), made("d0")
    lends_nothing(here, there)


def test_a_descriptor_that_is_lost_on_the_way_costs_a_part_and_sockets_are_used(made, monkeypatch):
    """As where the receiver has as many files open as it may."""
    monkeypatch.setattr(PlainWire, "handed", lambda self: None)
    here, there = made("p0"), made("d0")
    here.links.meet("d0", there.links.addresses[0])
    until(lambda: here.links.post("d0", part(0)) and there.get() and there.counts["unmapped"])
    until(lambda: here.counts["unlent"])
    while not there.heard.empty():
        there.get()
    here.links.post("d0", part(3))
    assert same(there.get(), part(3)) and here.counts["connected"] == 2 and not here.counts["ended"]


def test_where_nothing_is_to_be_lent_sockets_are_used(made):
    here, there = made("p0", shared_bytes=0), made("d0")
    here.links.meet("d0", there.links.addresses[0])
    for number in range(5):
        here.links.post("d0", part(number))
        assert same(there.get(), part(number))
    assert not here.counts["shared"] and not here.counts["unlent"]


# -- who knows the secret and talks nonsense -----------------------------------------------------------------------


def placed(offset, about=None, size=None):
    about = about or part(0)
    header = header_of(about, list(sums_by_head(about)))
    return frame(PLACED, PLACE.pack(offset, num_bytes(about) if size is None else size) + header)


def lent(size=ROOM):
    return frame(LEND, SIZE.pack(size))


async def _insider(end, name, frames, descriptor=None):
    """Greet as a lane, say these frames (a descriptor beside the first), and wait for the end of the connection."""
    pipe = await dial(parse(end.links.addresses[0]), None)
    try:
        await greet(pipe, SECRET, Card(name, "d0", "bulk", "", GEOMETRY), True)
        if descriptor is not None:
            await pipe.hand(frames.pop(0), descriptor)
        with contextlib.suppress(EOFError, OSError):
            await pipe.send(frames)
            await asyncio.wait_for(pipe.take(1 << 20), 10)
    finally:
        pipe.close()


NONSENSE = {
    "a slot beyond the end": (ROOM - 64, "out of bounds"),
    "a slot far beyond": (1 << 63, "out of bounds"),
    "a slot that is not aligned": (8, "not aligned"),
}


@pytest.mark.parametrize("name", NONSENSE)
def test_a_slot_that_cannot_be_ends_its_connection_alone(pair, name):
    here, there = pair
    arena = Arena(ROOM)
    offset, words = NONSENSE[name]
    asyncio.run(_insider(there, "x0", [lent(), placed(offset)], arena.descriptor))
    arena.close()
    assert there.counts["malformed"] == 1 and words in there.links.refusals[-1] and there.heard.empty()
    here.links.post("d0", part(1))
    assert same(there.get(), part(1)) and here.counts["ended"] == 0


def test_a_slot_over_one_that_is_held_ends_the_connection(pair):
    _, there = pair
    arena = Arena(ROOM)
    arena.room(0, ROOM)
    about = part(0)
    payload = b"".join(each.tobytes() for each in about.staged[:2])
    arena.room(0, num_bytes(about))[:] = np.frombuffer(payload, np.uint8)
    asyncio.run(_insider(there, "x0", [lent(), placed(0), placed(64)], arena.descriptor))
    arena.close()
    assert same(there.get(), about) and "over one in use" in there.links.refusals[-1]


def test_other_nonsense_about_memory_is_malformed(pair):
    here, there = pair
    other = part(0, 4)
    nonsense = {
        "never lent": [placed(0)],
        "were not lent": [frame(FREED, SIZE.pack(0))],
        "of another length": [frame(FREED, b"123")],
        "a payload": [frame(WANT, b"\1", 5)],
        "of another length ": [frame(LEND, b"1")],
        "parts: got checksums without blocks": [lent(), placed(0, other, 0)],
    }
    for number, (words, frames) in enumerate(nonsense.items(), 1):
        arena = Arena(ROOM)
        descriptor = arena.descriptor if len(frames) == 2 else None
        asyncio.run(_insider(there, f"x{number}", frames, descriptor))
        arena.close()
        assert there.counts["malformed"] == number and words.strip() in there.links.refusals[-1], words
    here.links.post("d0", part(1))
    assert same(there.get(), part(1)) and here.counts["ended"] == 0


def test_memory_that_may_shrink_is_refused(pair):
    here, there = pair
    descriptor = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, ROOM)
    asyncio.run(_insider(there, "x0", [lent(), placed(0)], descriptor))
    os.close(descriptor)
    assert "expected it sealed" in there.links.refusals[-1] and there.heard.empty()
    here.links.post("d0", part(1))
    assert same(there.get(), part(1))


def test_memory_comes_once(pair):
    _, there = pair
    arena = Arena(ROOM)
    asyncio.run(_insider(there, "x0", [lent(), lent()], arena.descriptor))
    arena.close()
    assert "a second time" in there.links.refusals[-1]


def test_descriptors_of_strangers_are_closed(pair):
    _, there = pair
    path = there.links.addresses[0].removeprefix("unix:")
    gc.collect()  # what earlier tests left, or it would hide a leak
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(10):
        with socket.socket(socket.AF_UNIX) as stranger:
            stranger.connect(path)
            for _ in range(3):
                socket.send_fds(stranger, [b"x"], [0, 1])
            socket.send_fds(stranger, [bytes(64)], [0, 1, 2])
    until(lambda: there.counts["refused"] + there.counts["silent"] == 10)
    until(lambda: len(os.listdir("/proc/self/fd")) <= before)


# -- processes -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def peer_process(name, address):
    """A process of its own that sends back what it hears."""
    command = [sys.executable, "peer.py", name, SECRET.hex(), address]
    environment = {**os.environ, "PYTHONPATH": str(HERE.parents[2])}
    with subprocess.Popen(
        command, cwd=HERE, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline().strip() == address
        yield process
        process.stdin.close()


def test_two_processes_send_each_other_parts_and_one_that_is_killed_takes_nothing_along(made, tmp_path):
    here, address = made("p0"), f"unix:{tmp_path}/sockets/d0.sock"
    here.links.meet("d0", address)
    held = []
    with peer_process("d0", address) as process:
        for number in range(40):
            here.links.post("d0", part(number, 16))
            held = [*held, here.get()][-5:]
            assert same(held[-1], part(number, 16))
        assert here.counts["shared"] >= 38 and here.counts["unshared"] == 0
        bulk = here.links._channels["d0", "bulk"].connections[-1]
        assert len(bulk.shared.borrowed.slots) >= 5, "what came back lies in memory of the other process"
        process.send_signal(signal.SIGKILL)
        process.wait()
        until(lambda: here.counts["ended"] >= 2)
        assert all(same(each, part(number, 16)) for number, each in enumerate(held, 35))
    with peer_process("d0", address):
        until(lambda: here.links.post("d0", Fetch(1, 2, 3, 4)) and not here.heard.empty(), 20)
        here.links.post("d0", part(50))
        while isinstance(back := here.get(), Fetch):
            pass
        assert same(back, part(50))
