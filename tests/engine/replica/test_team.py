"""How the processes of a lane find each other: whoever comes, in whatever order, only its own are let in."""

import contextlib
import queue
import socket
import threading
import time

import pytest

from engine.errors import GroupLost, Misfit
from engine.movers.geometry import Geometry
from engine.replica import orders, team
from engine.replica.team import meet_followers, meet_leader

SECRET, OTHER = bytes(range(32)), bytes(32)
GEOMETRY = Geometry(2, 4, 8, "float16", 16, "r1", "invariant")


class Meeting:
    """A leader at its door on a thread."""

    def __init__(self, processes, lane="p0"):
        self.door = socket.create_server(("127.0.0.1", 0))
        self.address = "{}:{}".format(*self.door.getsockname())
        self._found, self.channels = queue.Queue(), []
        about = self.door, lane, processes, SECRET, GEOMETRY, lambda reason: None
        self._thread = threading.Thread(target=lambda: self._found.put(self._meet(about)))
        self._thread.start()

    @staticmethod
    def _meet(about):
        try:
            return meet_followers(*about)
        except GroupLost as error:
            return error

    def comes(self, rank, lane="p0", secret=SECRET, geometry=GEOMETRY):
        self.channels.append(meet_leader(self.address, lane, rank, secret, geometry))
        return self.channels[-1]

    def result(self):
        found = self._found.get(timeout=10)
        if not isinstance(found, GroupLost):
            self.channels += found.channels
        return found

    def close(self):
        self._thread.join(10)
        assert not self._thread.is_alive() and self.door.fileno() == -1, "the door is shut once all have come"
        for each in self.channels:
            each.close()
        for each in self.channels:
            each._socket.close()


@pytest.fixture
def meeting(monkeypatch):
    """Makes one; who is missing is so after `wait_s`."""
    made = []

    def make(processes=2, wait_s=10.0):
        monkeypatch.setattr(team, "MEET_S", wait_s)
        monkeypatch.setattr(team, "AGAIN_S", 0.01)
        made.append(Meeting(processes))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.mark.parametrize("order", [(1, 2, 3), (3, 1, 2)])
def test_followers_that_come_in_any_order_are_known_by_rank(meeting, order):
    here = meeting(4)
    there = {rank: here.comes(rank) for rank in order}
    followers = here.result()
    for rank in (1, 2, 3):
        followers.channels[rank - 1].say(orders.Born(f"rank {rank}"))
        assert there[rank].receive() == orders.Born(f"rank {rank}")
        assert followers.channels[rank - 1].peer == f"rank {rank} of p0"


def test_a_follower_dials_until_its_leader_listens(meeting, monkeypatch):
    monkeypatch.setattr(team, "AGAIN_S", 0.01)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = taken.getsockname()
    found, where = queue.Queue(), "{}:{}".format(*address)
    thread = threading.Thread(target=lambda: found.put(meet_leader(where, "p0", 1, SECRET, GEOMETRY)))
    thread.start()
    time.sleep(0.1)
    with socket.create_server(address) as door:
        followers = meet_followers(door, "p0", 2, SECRET, GEOMETRY, lambda reason: None)
    thread.join(5)
    for each in (*followers.channels, found.get()):
        each.close()
        each._socket.close()


@pytest.mark.parametrize(
    "odd, words",
    [({"kv_heads": 2}, "kv_heads is 4 there and 2 here"), ({"revision": "r2"}, "revision is r1 there and r2 here")],
)
def test_one_of_another_model_is_told_the_difference_and_does_not_take_a_place(meeting, odd, words):
    here = meeting(2)
    with pytest.raises(Misfit, match=words) as caught:
        here.comes(1, geometry=GEOMETRY._replace(**odd))
    assert caught.value.exit_code == 78
    here.comes(1)
    assert len(here.result().channels) == 1


def test_one_that_looks_for_another_lane_is_told_so(meeting):
    here = meeting(2)
    with pytest.raises(Misfit, match="p0 answers where d1 was looked for"):
        here.comes(1, lane="d1")
    here.comes(1)
    here.result()


def test_one_that_does_not_know_the_secret_is_never_let_in(meeting):
    here = meeting(2, wait_s=0.5)
    with pytest.raises(GroupLost, match="lane p0: its leader has not answered within 0 s"):
        here.comes(1, secret=OTHER)
    assert "rank 1 has not come" in str(here.result())


@pytest.mark.parametrize("rank", [1, 7])
def test_a_rank_that_is_taken_or_that_the_lane_has_not_gets_no_place(meeting, rank):
    here = meeting(3)
    first = here.comes(1)
    second = here.comes(rank)
    with pytest.raises(GroupLost):
        second.receive()
    here.comes(2)
    followers = here.result()
    followers.channels[0].say(orders.Go())
    assert first.receive() == orders.Go()


def test_strangers_at_the_door_keep_nobody_out(meeting, monkeypatch):
    monkeypatch.setattr(team, "GREETING_S", 1.0)
    here = meeting(2)
    host, port = here.address.split(":")
    with contextlib.ExitStack() as stack:
        for said in (b"", b"GET / HTTP/1.1\r\n\r\n", bytes(4096)):
            stranger = stack.enter_context(socket.create_connection((host, int(port))))
            with contextlib.suppress(OSError):
                stranger.sendall(said)
        here.comes(1)
        assert len(here.result().channels) == 1


def test_who_is_missing_is_named_by_rank(meeting):
    here = meeting(4, wait_s=3.0)  # time enough for the others, also on a busy machine
    here.comes(1)
    here.comes(3)
    assert str(here.result()) == "lane p0: rank 2 has not come within 3 s"


def test_a_leader_that_is_not_there_is_waited_for_and_then_named(monkeypatch):
    monkeypatch.setattr(team, "MEET_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = "{}:{}".format(*taken.getsockname())
    began = time.monotonic()
    with pytest.raises(GroupLost, match="lane p0: its leader has not answered"):
        meet_leader(address, "p0", 1, SECRET, GEOMETRY)
    assert time.monotonic() - began >= 0.2
