"""How lanes join, leave and learn that they were cut off."""

import pytest

from engine.core.membership import Hello, Member, Members, Refused, Welcome
from engine.core.messages import Fence, Hold, Meet
from engine.core.router import Router
from engine.core.session import SILENT_S, Packet


class Cluster:
    """A front and lanes that hear each other at once, except those in `deaf`, which are cut off both ways."""

    def __init__(self, *names):
        self.router = Router(4, 64)
        self.members = Members(self.router, 77)
        self.lanes = {name: Member(name, "both", 0.0, (f"at {name}",)) for name in names}
        self.deaf, self.now = set(), 0.0
        self.heard = {name: [] for name in names}

    def turn(self, after_s=0.1):
        self.now += after_s
        self.answer(self.members.tick(self.now))
        for name, lane in self.lanes.items():
            for said in lane.tick(self.now):
                if name not in self.deaf:
                    self.answer(self.members.receive(self.now, name, said))
        self.answer(self.members.flush(self.now))

    def answer(self, answers):
        for name, answered in answers:
            if name in self.lanes and name not in self.deaf:
                self.heard[name] += self.lanes[name].receive(self.now, answered)

    def pass_time(self, time_s):
        for _ in range(round(time_s / 0.1)):
            self.turn()


def test_a_lane_says_hello_until_it_is_welcomed():
    lane = Member("a", "prefill", 1.0, ("here",), 2)
    assert lane.tick(0.9) == [] and lane.tick(1.0) == [Hello("a", "prefill", ("here",), 2)] and lane.tick(1.1) == []
    assert lane.tick(1.6) == [Hello("a", "prefill", ("here",), 2)]
    assert lane.receive(1.7, Welcome("b", 4)) == [] and lane.session is None, "meant for somebody else"
    lane.receive(1.7, Welcome("a", 5))
    lane.receive(1.7, Welcome("a", 6))
    assert lane.session.number == 5, "the first counts"
    assert not any(isinstance(said, Hello) for said in lane.tick(9.9))


def test_hello_makes_a_lane_and_again_is_nothing():
    members = Members(Router(4, 64), 77)
    assert members.receive(0.0, "a", Hello("a", "decode")) == [("a", Welcome("a", 77))]
    assert members.receive(0.1, "a", Hello("a", "decode")) == [("a", Welcome("a", 77))]
    assert members.receive(0.1, "b", Hello("b", "prefill")) == [("b", Welcome("b", 78))]
    assert {name: lane.role for name, lane in members.router.lanes.items()} == {"a": "decode", "b": "prefill"}


def test_a_packet_of_no_session_or_of_another_is_refused():
    members = Members(Router(4, 64), 77)
    assert members.receive(0.0, "a", Packet(77, 0, 0, None)) == [("a", Refused("a"))]
    members.receive(0.0, "a", Hello("a", "both"))
    assert members.receive(0.0, "a", Packet(78, 0, 0, None)) == [("a", Refused("a"))]
    assert members.receive(0.0, "a", Packet(77, 0, 0, None)) == []


@pytest.mark.parametrize("how", ["silent", "lost"])
def test_a_lane_given_up_never_comes_back_under_its_name(how):
    cluster = Cluster("a", "b")
    cluster.pass_time(1.0)
    if how == "silent":
        cluster.deaf.add("a")
        cluster.pass_time(SILENT_S + 0.5)
        cluster.deaf.clear()
    else:
        cluster.members.lost("a")
        cluster.members.lost("a")
    assert set(cluster.router.lanes) == {"b"}
    cluster.pass_time(1.5)
    assert cluster.lanes["a"].fenced and not cluster.lanes["b"].fenced
    assert cluster.members.receive(cluster.now, "a", Hello("a", "both")) == [("a", Refused("a"))]
    assert set(cluster.router.lanes) == {"b"} and Fence("a") in cluster.heard["b"]
    cluster.members.receive(cluster.now, "a2", Hello("a2", "both"))
    assert set(cluster.router.lanes) == {"b", "a2"}


def test_a_front_that_is_silent_fences_its_lanes():
    cluster = Cluster("a")
    cluster.pass_time(1.0)
    cluster.deaf.add("a")
    cluster.pass_time(SILENT_S - 0.5)
    assert not cluster.lanes["a"].fenced
    cluster.pass_time(1.0)
    assert cluster.lanes["a"].fenced


def test_a_refusal_of_another_name_changes_nothing():
    lane = Member("a.2", "both", 0.0)
    lane.receive(0.0, Refused("a.1"))
    assert not lane.fenced
    lane.receive(0.0, Refused("a.2"))
    assert lane.fenced


def test_packets_of_another_session_are_not_taken_by_a_lane():
    lane = Member("a", "both", 0.0)
    assert lane.receive(0.0, Packet(5, 1, 0, Fence("x"))) == [], "before it is welcomed"
    lane.receive(0.0, Welcome("a", 5))
    assert lane.receive(0.0, Packet(4, 1, 0, Fence("x"))) == []
    assert lane.receive(0.0, Packet(5, 1, 0, Fence("x"))) == [Fence("x")]


def test_what_the_router_says_reaches_its_lane_once_and_in_order():
    cluster = Cluster("a", "b")
    cluster.pass_time(0.5)
    said = [Hold((serial,), True) for serial in range(5)]
    cluster.router.outbox += [("a", message) for message in said]
    cluster.router.outbox.append(("nobody", said[0]))
    cluster.deaf.add("a")
    cluster.pass_time(0.5)
    cluster.deaf.clear()
    cluster.pass_time(1.0)
    assert [m for m in cluster.heard["a"] if isinstance(m, Hold)] == said
    assert not any(isinstance(m, Hold) for m in cluster.heard["b"])


def test_lanes_are_told_where_the_others_are_but_not_those_that_were_lost():
    cluster = Cluster("a", "b")
    cluster.pass_time(1.0)
    assert cluster.heard == {"a": [Meet("b", ("at b",))], "b": [Meet("a", ("at a",))]}
    cluster.members.lost("a")
    cluster.lanes["c"], cluster.heard["c"] = Member("c", "both", cluster.now, ("at c", "and here"), 4), []
    cluster.pass_time(1.0)
    assert cluster.heard["c"] == [Meet("b", ("at b",), 1)]
    assert Meet("c", ("at c", "and here"), 4) in cluster.heard["b"]
