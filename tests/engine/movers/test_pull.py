"""KV that the receiver pulls out of the sender's memory: refused or broken, the socket takes it; nonsense ends.

What pulls is a stand-in here, that reads by address; test_nixl.py has the library.
"""

import asyncio
import contextlib
import ctypes
from collections import Counter

import pytest
from drawn_messages import GEOMETRY, same
from ends import ROOM, SECRET, End, Memory, crosses, part, until

from engine.errors import Malformed
from engine.movers import pull
from engine.movers.addresses import parse
from engine.movers.cards import Card
from engine.movers.frames import frame
from engine.movers.greeting import greet
from engine.movers.parts import header_of, num_bytes, sums_by_head
from engine.movers.pull import ABOUT, DONE, OFFER, OFFSET, PLACE, PLACED, REFUSED, WANT, Pull
from engine.movers.sockets import dial


@pytest.fixture
def made():
    """Makes ends with agents that can meet, and ends them."""
    meets = set()
    with contextlib.ExitStack() as stack:

        def make(name, num_bytes=ROOM, mover=True):
            end = End(name, "127.0.0.1:0", mover=Memory(meets, num_bytes) if mover else None)
            stack.callback(end.close)
            return end

        yield make


@pytest.fixture
def pair(made):
    """Two that know each other."""
    here, there = made("p0"), made("d0")
    here.links.meet("d0", there.links.addresses[0])
    return here, there


def test_what_was_pulled_is_counted_and_its_slot_free_at_once(pair):
    here, there = pair
    held = []
    for number in range(5):
        here.links.post("d0", part(number))
        held.append(there.get())
        assert same(held[-1], part(number))
    until(lambda: here.counts["pulled"] == 5 and len(here.mover.staging.slots) == 0 and here.mover.watched == 0)
    assert here.counts["unpulled"] == 0 and len(there.mover.landing.slots) == 5


def test_a_pull_that_fails_is_refused_and_the_socket_takes_this_part_and_all_after_it(pair):
    here, there = pair
    assert crosses(here, there, part(0))
    for error in (OSError("broken"), TimeoutError("late")):
        there.mover.fails = error
        for number in range(1, 4):
            assert crosses(here, there, part(number))
        until(lambda: not here.mover.watched)
    assert there.counts["unread"] == 1 and here.counts["pulled"] == 1
    assert here.counts["unpulled"] == here.counts["unoffered"] == 1
    assert here.counts["ended"] == there.counts["ended"] == 0 and len(here.mover.staging.slots) == 0


def test_metadata_that_means_nothing_is_refused_and_the_socket_is_used(pair):
    here, there = pair
    here.mover.metadata = b"\0 garbage"
    for number in range(4):
        assert crosses(here, there, part(number))
    until(lambda: here.counts["unoffered"] == 1)
    assert there.counts["unmet"] == 1 and there.counts["ended"] == 0 and not here.counts["pulled"]


def test_where_nothing_can_land_the_socket_takes_what_does_not_fit_and_no_more(made):
    here, there = made("p0"), made("d0", num_bytes=3 * 8192)
    here.links.meet("d0", there.links.addresses[0])
    held = []
    for number in range(5):
        here.links.post("d0", part(number))
        held.append(there.get())
        assert same(held[-1], part(number))
    until(lambda: here.counts["pulled"] == 3 and not here.mover.watched)
    assert there.counts["unlanded"] == 2 == here.counts["unpulled"]
    del held[1]
    assert crosses(here, there, part(9))
    until(lambda: here.counts["pulled"] == 4)
    assert same(held[0], part(0)) and same(held[1], part(2)), "nothing was written over"


def test_a_part_larger_than_all_slots_goes_through_the_socket(made):
    here, there = made("p0", num_bytes=8192), made("d0")
    here.links.meet("d0", there.links.addresses[0])
    for number, blocks in enumerate([9, 8, 32]):
        assert crosses(here, there, part(number, blocks))
    until(lambda: here.counts["pulled"] == 1)
    assert here.counts["unpulled"] == 2


def test_a_slot_that_is_written_again_before_it_was_read_is_noticed(pair):
    here, there = pair
    assert crosses(here, there, part(0))
    there.mover.changes = lambda address: ctypes.memset(address + 5, 77, 1)
    here.links.post("d0", part(1))
    assert same(there.get(), part(1)._replace(staged=None)) and there.counts["damaged"] == 1
    there.mover.changes = lambda address: None
    assert crosses(here, there, part(1))


@pytest.mark.parametrize("side", ["p0", "d0"])
def test_where_one_side_has_no_library_the_socket_is_used(made, side, monkeypatch):
    monkeypatch.setattr(pull, "ASKED_S", 0.1)
    here, there = (made(name, mover=name != side) for name in ("p0", "d0"))
    here.links.meet("d0", there.links.addresses[0])
    for number in range(4):
        assert crosses(here, there, part(number)) and crosses(there, here, part(number))
    assert not here.counts["pulled"] and not there.counts["pulled"] and here.counts["ended"] == 0


def test_libraries_of_two_versions_do_not_meet(made):
    here, there = made("p0"), made("d0")
    there.mover.version = b"memory 2"
    here.links.meet("d0", there.links.addresses[0])
    assert crosses(here, there, part(0)) and crosses(here, there, part(1))
    assert here.counts["unoffered"] == 1 and not here.counts["pulled"] and not there.mover.known


def test_a_connection_that_ends_gives_back_its_slots_and_forgets_the_peer(pair, monkeypatch):
    here, there = pair
    monkeypatch.setattr(pull.Pull, "_answered", lambda self, kind, offsets: None)
    here.links.post("d0", part(1))
    held = there.get()
    assert len(here.mover.staging.slots) == here.mover.watched == 1 and there.mover.known
    here.links.forget("d0")
    until(lambda: there.counts["ended"] and not there.mover.known)
    until(lambda: len(here.mover.staging.slots) == here.mover.watched == 0)
    assert same(held, part(1))
    monkeypatch.undo()
    here.links.meet("d0", there.links.addresses[0])
    until(lambda: crosses(here, there, part(2)) and here.counts["pulled"])


def test_a_connection_that_ends_while_a_part_waits_for_room_takes_none():
    async def ended_while_it_waits():
        mover = Memory(set(), 8192)
        ended = Pull(mover, GEOMETRY, Counter())
        await ended.heard(WANT, mover.version)
        assert len(await ended.place(part(0), b"")) == 2
        waiting = asyncio.create_task(ended.place(part(1), b""))
        await asyncio.sleep(0.01)
        ended.close()
        return await waiting, len(mover.staging.slots), mover.watched

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(pull, "SOCKET_RATE", 8192 / 5.0)
        assert asyncio.run(ended_while_it_waits()) == ([], 0, 0)


# -- who knows the secret and talks nonsense -----------------------------------------------------------------------


def placed(offset, about=None, size=None):
    about = about or part(0)
    header = header_of(about, list(sums_by_head(about)))
    return frame(PLACED, PLACE.pack(offset, num_bytes(about) if size is None else size) + header)


def offer(metadata, num_bytes=ROOM, memory=0, address=1 << 20):
    return frame(OFFER, ABOUT.pack(address, num_bytes, memory, 0) + metadata)


async def _insider(end, name, frames):
    """Greet as a lane, say these frames, and wait for the end of the connection."""
    pipe = await dial(parse(end.links.addresses[0]), None)
    try:
        await greet(pipe, SECRET, Card(name, "d0", "bulk", "", GEOMETRY), True)
        with contextlib.suppress(EOFError, OSError):
            await pipe.send(frames)
            await asyncio.wait_for(pipe.take(1 << 20), 10)
    finally:
        pipe.close()


NONSENSE = {
    "a slot beyond the end": ("out of bounds", lambda known: [offer(known), placed(ROOM - 64)]),
    "a slot far beyond": ("out of bounds", lambda known: [offer(known), placed((1 << 64) - 64)]),
    "a slot that is not aligned": ("not aligned", lambda known: [offer(known), placed(8)]),
    "a slot of nothing": ("out of bounds", lambda known: [offer(known), placed(0, size=0)]),
    "a slot never offered": ("never offered", lambda known: [placed(0)]),
    "an offer of too much": ("cannot be", lambda known: [offer(known, 1 << 40)]),
    "an offer of nothing": ("cannot be", lambda known: [offer(known, 0)]),
    "an offer past the last address": ("cannot be", lambda known: [offer(known, address=(1 << 64) - 1)]),
    "memory of no kind": ("cannot be", lambda known: [offer(known, memory=2)]),
    "much metadata": ("of metadata", lambda known: [offer(bytes(1 << 17))]),
    "two offers": ("a second time", lambda known: [offer(known), offer(known)]),
    "two offers, of which none is good": ("a second time", lambda known: [offer(b"?"), offer(b"?")]),
    "an answer about nothing": ("not in use", lambda known: [frame(DONE, OFFSET.pack(0))]),
    "a refusal of nothing": ("not in use", lambda known: [frame(REFUSED, OFFSET.pack(0))]),
    "many answers": ("more slots", lambda known: [frame(DONE, bytes(8 * 1025))]),
    "a header that is short": ("another length", lambda known: [frame(OFFER, b"1")]),
    "an answer that is short": ("another length", lambda known: [frame(DONE, b"123")]),
    "a payload": ("a payload", lambda known: [frame(WANT, b"", 5)]),
}


@pytest.mark.parametrize("name", NONSENSE)
def test_nonsense_ends_its_connection_alone(pair, name):
    here, there = pair
    assert crosses(here, there, part(0))
    words, frames = NONSENSE[name]
    asyncio.run(_insider(there, "x0", frames(here.mover.metadata)))
    assert there.counts["malformed"] == 1 and words in there.links.refusals[-1] and there.heard.empty()
    assert crosses(here, there, part(1)) and here.counts["ended"] == 0


def test_who_asks_for_no_library_is_offered_none(made):
    there = made("d0", mover=False)
    asyncio.run(_insider(there, "x0", [frame(WANT, b"any"), offer(b"any")]))
    assert there.counts["malformed"] == 1 and "not asked for" in there.links.refusals[-1]


def test_a_slot_that_was_answered_is_not_answered_again(pair):
    here, there = pair

    async def answers_twice():
        pipe = await dial(parse(here.links.addresses[0]), None)
        await greet(pipe, SECRET, Card("x0", "p0", "bulk", "", GEOMETRY), True)
        await pipe.send([frame(WANT, here.mover.version)])
        here.links.post("x0", part(0))
        await pipe.some()
        until(lambda: here.mover.watched)
        with contextlib.suppress(EOFError, OSError):
            await pipe.send([frame(REFUSED, OFFSET.pack(0) * 2)])
            await asyncio.wait_for(pipe.take(1 << 20), 10)
        pipe.close()

    asyncio.run(answers_twice())
    assert here.counts["malformed"] == 1 and "not in use" in here.links.refusals[-1]
    until(lambda: len(here.mover.staging.slots) == here.mover.watched == 0)
    here.links.meet("d0", there.links.addresses[0])
    assert crosses(here, there, part(1))


def test_a_slot_that_the_socket_is_sending_is_not_answered_and_is_free_once_it_was_sent():
    async def sends():
        mover = Memory(set())
        one = Pull(mover, GEOMETRY, Counter())
        await one.heard(WANT, mover.version)
        await one.place(part(0), b"header")
        await one.heard(REFUSED, OFFSET.pack(0))
        *_, payload = await one.said()
        assert bytes(payload) == b"".join(each.tobytes() for each in part(0).staged[:2])
        with pytest.raises(Malformed, match="not in use"):
            await one.heard(DONE, OFFSET.pack(0))
        assert len(mover.staging.slots) == 1
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(one.said(), 0.01)
        return len(mover.staging.slots)

    assert asyncio.run(sends()) == 0
