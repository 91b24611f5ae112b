"""Two releases work together, and a third that is too far from one of them is refused.

There is one version so far: a second and a third are made here, with a field and a kind that the first lacks.
"""

import queue
import time
from contextlib import ExitStack
from typing import NamedTuple

import pytest
from drawn_messages import GEOMETRY, Drawn, same

from engine.core.handoff import Fetch
from engine.core.session import Packet
from engine.errors import Malformed
from engine.movers import cards, words
from engine.movers.fields import group, moment, text, whole
from engine.movers.frames import SPOKEN, Versions, frame, read_prefix
from engine.movers.links import Links
from engine.movers.versions import spoken

SECRET = bytes(range(32))
TABLES, CARDS = words.TABLES, cards.CARDS  # what there really is


class Note(NamedTuple):
    """What a session carries; from version 2 on with `why`."""

    number: int
    until: float | None
    why: str = ""


class Novelty(NamedTuple):
    """Of version 2."""

    number: int


OLD = group(Note, whole("nu"), moment("un"), without=("why",))
NEW = group(Note, whole("nu"), moment("un"), text("wy", 64))


@pytest.fixture(autouse=True)
def releases(monkeypatch):
    """Three versions: 1 is what there is, and a message."""
    now = words.TABLES[1]
    old = {**now, 47: (Note, OLD)}
    new = {**old, 47: (Note, NEW), 63: (Novelty, group(Novelty, whole("nu")))}
    tables = {1: old, 2: {**new, 67: (Packet, words.packet(2))}, 3: {**new, 67: (Packet, words.packet(3))}}
    monkeypatch.setattr(words, "TABLES", tables)
    monkeypatch.setattr(cards, "CARDS", dict.fromkeys((1, 2, 3), cards.CARDS[1]))
    for kind, number in ((Note, 47), (Novelty, 63)):
        monkeypatch.setitem(words.NUMBERS, kind, number)


@pytest.fixture
def made():
    with ExitStack() as stack:

        def make(name, *speaks, listen="127.0.0.1:0"):
            heard = queue.Queue()
            links = Links(
                name,
                SECRET,
                lambda *said: heard.put(said[1]),
                lambda peer: None,
                GEOMETRY,
                speaks=Versions(*speaks),
            )
            links.start([listen])
            stack.callback(links.close)
            links.heard = heard
            return links

        yield make


def until(holds, timeout=5):
    end = time.monotonic() + timeout
    while not holds():
        assert time.monotonic() < end, "it did not come to hold"
        time.sleep(0.005)


NOTE = Note(7, None, "because")


@pytest.mark.parametrize("carried", [False, True])
@pytest.mark.parametrize(
    ("dialer", "listener", "why"),
    [((1, 1), (2, 1), ""), ((2, 1), (1, 1), ""), ((2, 1), (2, 1), "because"), ((3, 2), (2, 1), "because")],
)
def test_both_ways_two_releases_say_what_both_know(made, dialer, listener, why, carried):
    def say(note):
        return Packet(3, 1, 0, note) if carried else note

    here, there = made("p0", *dialer), made("d0", *listener)
    here.meet("d0", there.addresses[0])
    for sender, receiver, name in ((here, there, "d0"), (there, here, "p0")):
        assert sender.post(name, say(NOTE))
        assert receiver.heard.get(timeout=5) == say(NOTE._replace(why=why))


@pytest.mark.parametrize("unix", [False, True])
def test_kv_passes_between_two_releases_through_sockets_and_shared_memory(made, unix, tmp_path):
    where = [f"unix:{tmp_path}/{name}/s.sock" if unix else "127.0.0.1:0" for name in ("a", "b")]
    here, there = made("p0", 2, 1, listen=where[0]), made("d0", 1, 1, listen=where[1])
    here.meet("d0", there.addresses[0])
    drawn = Drawn(3)
    for sender, receiver, name in ((here, there, "d0"), (there, here, "p0")):
        part = drawn.parts()
        assert sender.post(name, part)
        assert same(receiver.heard.get(timeout=5), part)
        assert sender.counts["shared"] == unix


def test_releases_too_far_apart_refuse_each_other_and_both_say_why(made):
    here, there = made("p0", 3, 2), made("d0", 1, 1)
    here.meet("d0", there.addresses[0])
    here.post("d0", NOTE)
    until(lambda: here.refusals and there.refusals)
    assert "got versions 1 to 1 there and 2 to 3 here; expected one in common" in here.refusals[-1]
    assert "got versions 2 to 3 there and 1 to 1 here; expected one in common" in there.refusals[-1]
    assert here.counts["refused"] and there.counts["refused"] and there.heard.empty()


def test_a_kind_that_the_older_lacks_is_dropped_and_counted_and_the_rest_goes_on(made):
    here, there = made("p0", 2, 1), made("d0", 1, 1)
    here.meet("d0", there.addresses[0])
    for message in (Novelty(1), NOTE, Novelty(2), Fetch(1, 2, 3, 4)):
        here.post("d0", message)
    assert there.heard.get(timeout=5) == NOTE._replace(why="")
    assert there.heard.get(timeout=5) == Fetch(1, 2, 3, 4)
    assert here.counts["unspoken"] == 2 and here.counts["connected"] == 1


def test_what_is_said_anew_keeps_its_moments_and_what_needs_no_change_is_not_touched():
    said = frame(*words.to_bytes(Note(1, 1000.0, "x"), 900.0, 2), version=2)
    old = spoken(said, 1)
    assert words.from_bytes(47, old[32:], 500.0, 1) == Note(1, 600.0)
    assert read_prefix(old, version=1).kind == 47 and spoken(old, 1) is old
    with pytest.raises(Malformed, match="kind 63, which version 1 does not have"):
        spoken(frame(*words.to_bytes(Novelty(1), 0.0, 2), version=2), 1)


def test_every_version_that_is_spoken_has_its_tables():
    for version in range(SPOKEN.oldest, SPOKEN.newest + 1):
        assert version in TABLES and version in CARDS
    assert SPOKEN.newest - SPOKEN.oldest <= 1
