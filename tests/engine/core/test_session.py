"""Two ends of a session over a link that loses, doubles and reorders."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.core import session
from engine.core.session import AGAIN_S, BEAT_S, SILENT_S, Packet, Session


class Link:
    """Two ends, and the packets on their way to each."""

    def __init__(self):
        self.ends = {"a": Session(1, 0.0), "b": Session(1, 0.0)}
        self.flying = {"a": [], "b": []}  # by receiver
        self.got = {"a": [], "b": []}
        self.now = 0.0

    def put(self, sender, packets):
        self.flying["b" if sender == "a" else "a"] += packets

    def say(self, sender, message):
        self.put(sender, self.ends[sender].send(self.now, message))

    def deliver(self, receiver, k, keep=False):
        flying = self.flying[receiver]
        if flying:
            k %= len(flying)
            packet = flying[k] if keep else flying.pop(k)
            self.got[receiver] += self.ends[receiver].receive(self.now, packet)

    def tick(self, after_s):
        self.now += after_s
        for name, end in self.ends.items():
            self.put(name, end.tick(self.now))

    def settle(self, rounds=60):
        """A link without faults from now on."""
        for _ in range(rounds):
            self.tick(0.1)
            for name in self.flying:
                while self.flying[name]:
                    self.deliver(name, 0)


NAME = st.sampled_from("ab")
MOVES = st.lists(
    st.one_of(
        st.tuples(st.just("say"), NAME),
        st.tuples(st.just("deliver"), NAME, st.integers(0, 50), st.booleans()),
        st.tuples(st.just("lose"), NAME),
        st.tuples(st.just("tick"), st.floats(0.0, 0.6)),
    ),
    max_size=120,
)


@settings(max_examples=200, deadline=None)
@given(MOVES, st.sampled_from([2, 4096]))
def test_messages_arrive_once_and_in_order_whatever_the_link_does(moves, window):
    link, said = Link(), {"a": [], "b": []}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "WINDOW", window)
        for kind, *values in moves:
            if kind == "say":
                (sender,) = values
                said[sender].append(f"{sender}{len(said[sender])}")
                link.say(sender, said[sender][-1])
            elif kind == "deliver":
                link.deliver(*values)
            elif kind == "lose":
                link.flying[values[0]].clear()
            else:
                link.tick(*values)
            for sender, receiver in ("ab", "ba"):
                assert link.got[receiver] == said[sender][: len(link.got[receiver])]
        link.settle(120)
    assert link.got["b"] == said["a"] and link.got["a"] == said["b"]
    assert not any(end._unacknowledged or end._early for end in link.ends.values())


def test_a_message_leaves_at_once_and_is_said_again_until_it_is_acknowledged():
    end = Session(5, 0.0)
    assert end.send(0.0, "x") == [Packet(5, 1, 0, "x")]
    assert end.tick(AGAIN_S - 0.01) == []
    assert end.tick(AGAIN_S) == [Packet(5, 1, 0, "x")] == end.tick(2 * AGAIN_S)
    assert end.receive(0.6, Packet(5, 0, 1, None)) == []
    assert end.tick(0.6 + AGAIN_S) == []


def test_an_acknowledgement_puts_the_next_saying_off():
    end = Session(1, 0.0)
    end.send(0.0, "x"), end.send(0.0, "y")
    end.receive(AGAIN_S - 0.01, Packet(1, 0, 1, None))
    assert end.tick(AGAIN_S) == [] and end.tick(2 * AGAIN_S - 0.01) == [Packet(1, 2, 0, "y")]


def test_what_does_not_fit_the_window_follows(monkeypatch):
    monkeypatch.setattr(session, "WINDOW", 2)
    end = Session(1, 0.0)
    assert [len(end.send(0.0, k)) for k in range(4)] == [1, 1, 0, 0]
    assert [packet.message for packet in end.tick(AGAIN_S)] == [0, 1]
    end.receive(0.3, Packet(1, 0, 2, None))
    assert [packet.message for packet in end.tick(0.3 + AGAIN_S)] == [2, 3]


def test_early_packets_are_kept_for_their_turn_within_bounds(monkeypatch):
    monkeypatch.setattr(session, "AHEAD", 2)
    end = Session(1, 0.0)
    for number in (4, 3, 2):
        assert end.receive(0.0, Packet(1, number, 0, number)) == []
    assert end.receive(0.0, Packet(1, 1, 0, 1)) == [1, 2], "neither 3 nor 4 was kept"
    assert end.receive(0.0, Packet(1, 4, 0, 4)) == []
    assert end.receive(0.0, Packet(1, 3, 0, 3)) == [3, 4]


def test_a_silent_end_beats_and_acknowledges_soon():
    end = Session(1, 0.0)
    assert end.tick(BEAT_S - 0.01) == [] and end.tick(BEAT_S) == [Packet(1, 0, 0, None)]
    end.receive(BEAT_S, Packet(1, 1, 0, "x"))
    assert end.tick(BEAT_S + AGAIN_S / 5 + 0.01) == [Packet(1, 0, 1, None)], "long before the next beat"


def test_a_peer_is_lost_after_a_silence_and_any_packet_ends_it():
    end = Session(1, 0.0)
    assert not end.lost(SILENT_S) and end.lost(SILENT_S + 0.01)
    end.receive(SILENT_S, Packet(1, 0, 0, None))
    assert not end.lost(2 * SILENT_S)


def test_two_ends_that_have_nothing_to_say_do_not_lose_each_other():
    link = Link()
    for _ in range(200):
        link.tick(0.1)
        for name in "ab":
            while link.flying[name]:
                link.deliver(name, 0)
        assert not any(end.lost(link.now) for end in link.ends.values())
