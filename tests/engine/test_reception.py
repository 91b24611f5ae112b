"""Processes that others start, as they come to the front: who gets a seat, who hears what, who is turned away."""

import json

import pytest

from engine.cluster.process import Seat
from engine.core.membership import Line
from engine.reception import Reception


class Hall:
    """A reception with two seats, what it answers, and what the keeper of the lane hears."""

    def __init__(self):
        self.seats = {("p0", rank): Seat(rank, f"h{rank}") for rank in range(2)}
        self.answers, self.heard = [], []
        self.reception = Reception(
            self.seats, lambda name, line: self.answers.append((name, json.loads(line.text)))
        )

    def begin(self):
        for seat in self.seats.values():
            seat.begin(self.heard.append)

    def says(self, sender, **words):
        self.reception.heard(sender, Line(json.dumps(words)))


@pytest.fixture
def hall():
    return Hall()


def test_who_comes_takes_the_seat_of_its_rank_and_is_heard(hall):
    hall.begin()
    hall.says("a", event="hello", lane="p0", rank=1)
    hall.says("a", event="ready")
    hall.seats["p0", 1].say({"start": {}})
    hall.seats["p0", 0].say({"start": {}})
    assert [(rank, words["event"]) for rank, words in hall.heard] == [(1, "hello"), (1, "ready")]
    assert hall.answers == [("a", {"start": {}})], "an empty seat hears nothing"


def test_what_is_said_before_a_life_begins_is_kept_for_it(hall):
    hall.says("a", event="hello", lane="p0", rank=0)
    assert hall.heard == []
    hall.begin()
    assert [(rank, words["event"]) for rank, words in hall.heard] == [(0, "hello")]


def test_a_seat_is_free_once_its_process_is_gone_and_not_before(hall):
    hall.begin()
    hall.says("a", event="hello", lane="p0", rank=0)
    hall.says("b", event="hello", lane="p0", rank=0)
    assert len(hall.heard) == 1 and hall.answers == [], "b is not answered, and asks again"
    hall.reception.gone("b")
    hall.reception.gone("a")
    assert hall.heard[1:] == [(0, None)]
    hall.says("b", event="hello", lane="p0", rank=0)
    assert hall.heard[2][1]["event"] == "hello"


def test_who_left_its_seat_late_harms_nobody_who_sits_there(hall):
    hall.begin()
    hall.says("a", event="hello", lane="p0", rank=0)
    hall.seats["p0", 0].end(0.0)  # it did not leave in time
    hall.begin()
    hall.says("b", event="hello", lane="p0", rank=0)
    hall.reception.gone("a")
    assert (0, None) not in hall.heard


@pytest.mark.parametrize(
    "words", [{"lane": "p9", "rank": 0}, {"lane": "p0", "rank": 7}, {"lane": "p0"}, {}, {"lane": [], "rank": []}]
)
def test_who_has_no_place_in_the_cluster_is_told_so(hall, words):
    hall.says("a", event="hello", **words)
    ((name, answer),) = hall.answers
    assert name == "a" and "no such lane and rank" in answer["refused"] and hall.heard == []


@pytest.mark.parametrize("text", ["", "[]", "nonsense", "1"])
def test_a_line_that_is_no_object_is_refused(hall, text):
    hall.reception.heard("a", Line(text))
    assert "expected one" in hall.answers[0][1]["refused"]


def test_a_process_is_asked_to_leave_with_the_code_that_its_engine_understands(hall):
    hall.begin()
    hall.says("a", event="hello", lane="p0", rank=0)
    hall.seats["p0", 0].leave(75)
    assert hall.answers == [("a", {"leave": 75})]
