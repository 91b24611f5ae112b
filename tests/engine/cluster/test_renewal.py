"""A lane's processes that are ended on purpose: the next life follows at once, and it counts as no failure."""

import os
import queue
import sys
import time

import pytest

from engine.cluster import supervisor
from engine.cluster.process import Command, Seat
from engine.cluster.supervisor import MOST_STARTS, Supervisor

SCRIPT = """
import json, sys
def say(**words): print(json.dumps(words), flush=True)
say(event="hello", alike={})
next(line for line in sys.stdin if "start" in json.loads(line))
say(event="ready")
sys.stdin.read()
"""
WAIT_S = 20.0


@pytest.fixture
def told(monkeypatch):
    monkeypatch.setattr(supervisor, "FIRST_WAIT_S", 10.0)  # a failure would wait for so long
    return queue.Queue()


def next_of(told, event):
    while True:
        _, words = told.get(timeout=WAIT_S)
        if words["event"] == event:
            return words


def test_a_lane_is_renewed_more_often_than_it_may_fail_and_without_a_wait(told):
    commands = [Command([sys.executable, "-c", SCRIPT], os.environ, f"h{rank}") for rank in range(2)]
    made = Supervisor({"w0": commands}, lambda slot, words: told.put((slot, words)))
    made.start(lambda *_: None)
    worker = made.workers["w0"]
    try:
        next_of(told, "ready")
        for _ in range(MOST_STARTS + 1):
            before = [process.popen.pid for process in worker.processes]
            began = time.monotonic()
            worker.renew()
            assert not next_of(told, "exit")["given_up"]
            next_of(told, "ready")
            assert time.monotonic() - began < 9.0 and not worker.given_up
            assert not {process.popen.pid for process in worker.processes} & {*before}, "all of its processes"
        assert worker.lives == MOST_STARTS + 2 and worker.problem == ""
    finally:
        made.stop()
    assert worker.stopping


def test_a_seat_is_left_with_75_so_that_its_engine_starts_the_process_again(told):
    seat, said = Seat(0, "h0"), queue.Queue()
    made = Supervisor({"w0": [seat]}, lambda slot, words: told.put((slot, words)))
    worker = made.workers["w0"]

    def come(who):
        assert seat.come(who, lambda words: said.put((who, words)))
        seat.heard({"event": "hello", "alike": {}})
        while "start" not in (got := said.get(timeout=WAIT_S))[1]:
            pass
        assert got[0] == who
        seat.heard({"event": "ready"})
        next_of(told, "ready")

    worker.start()
    try:
        come("one")
        worker.renew()
        while (got := said.get(timeout=WAIT_S)) != ("one", {"leave": 75}):
            assert "beat" in got[1]
        seat.gone("one")
        assert next_of(told, "exit")["given_up"] is False
        come("two")
        assert worker.lives == 2 and worker.group.state(0) == "ready"
    finally:
        seat.gone("two")
        made.stop()
