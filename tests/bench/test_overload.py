import json
import time

import pytest
from prometheus_client import CollectorRegistry

from bench import overload
from bench.overload import main
from bench.overload_real import Crowd, Seen
from engine import embedded
from engine.clock import SystemClock
from engine.core import prefix
from engine.core.agent import Agent
from engine.core.request import Limits
from engine.core.scheduler import LaneShape, Scheduler
from engine.observe.metrics import Metrics
from engine.replica.lane import Lane
from engine.replica.replica import ModelInfo, Replica
from engine.sim.runner import ModelledRunner
from engine.text.text import Text


class Slow(ModelledRunner):
    """A device that takes its time, so that clients can outrun it."""

    def collect(self):
        time.sleep(0.004)
        return super().collect()


@pytest.fixture
def crowd():
    text = Text(embedded.folder())
    shape = LaneShape(64, 16, 2, 32, 128, text.vocab)
    limits, info = Limits(text.vocab, 128, 63 * 16, 16, ()), ModelInfo("hash", "r1", 128, text.vocab, (), {})
    clock, metrics = SystemClock(), Metrics(CollectorRegistry())
    served = Replica(info, text, limits, clock, metrics)
    agent = Agent("b0", Scheduler(shape, prefix.root("bench")))
    served.add_lane(Lane(agent, Slow(64, 16, 2, 128, text.vocab), clock, metrics))
    made = Crowd(served, rows=2, seed=3)
    yield made
    made.stop()


def test_real_clients_see_who_is_served_and_who_is_refused_at_once(crowd):
    able = crowd.closed(2.0)
    seen = crowd.open(10 * able, 2.0, in_time_s=1.0)
    assert able > 1.0 and seen.asked == len(seen.waits) + len(seen.refusals)
    assert len(seen.refusals) > seen.asked / 4 and 0.0 < seen.goodput < 2 * able
    assert all(took < 1.0 and hint > 0.0 for took, hint in seen.refusals)
    assert 0 < seen.longest_queue < seen.asked and seen.after_bytes > 0 < seen.before_bytes


def test_real_clients_within_what_is_possible_are_all_served(crowd):
    seen = crowd.open(2.0, 1.0, in_time_s=5.0)
    assert not seen.refusals and len(seen.waits) == seen.asked


def test_the_command_shows_and_keeps_simulated_rows(tmp_path, capsys):
    file = tmp_path / "overload.jsonl"
    assert main(["--x", "2,10", "--seconds", "12", "--real-seconds", "0", "--out", str(file)]) == 0
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(line["figures"]["lanes"], line["figures"]["x"]) for line in lines] == [
        ("both", 2.0), ("both", 10.0), ("prefill decode", 2.0), ("prefill decode", 10.0)
    ]  # fmt: skip
    for line in lines:
        figures = line["figures"]
        assert line["kind"] == "computed" and 0.7 < figures["goodput"] < 1.2
        assert 0.3 < figures["refused"] < 0.95 and figures["wait p50 s"] <= figures["wait p99 s"] < 2.5
    assert "goodput" in capsys.readouterr().out


def test_real_rows_take_the_capacity_before_and_after(monkeypatch, tmp_path):
    class Scripted(Crowd):
        def __init__(self, served, rows, seed):
            assert served in overload.REAL and rows == 3
            self.closings = iter((1.0, 10.0, 30.0))

        def closed(self, seconds):
            return next(self.closings)

        def open(self, rate, seconds, in_time_s):
            assert rate == 20.0 and (seconds, in_time_s) == (0.1, 4.0)
            return Seen(4, 15.0, [1.0, 2.0], [(0.001, 0.5), (0.003, 0.7)], 7, 100, 110)

        def stop(self):
            self.closings = None

    monkeypatch.setattr(overload, "Crowd", Scripted)
    monkeypatch.setattr(overload, "embedded", lambda lanes, rows: lanes)
    file = tmp_path / "overload.jsonl"
    assert main(["--x", "2", "--seconds", "0", "--real-seconds", "0.1", "--rows", "3", "--out", str(file)]) == 0
    first, second = (json.loads(line) for line in file.read_text().splitlines())
    assert first["kind"] == "measured" and second["figures"]["lanes"] == "prefill decode"
    figures = first["figures"]
    assert (figures["capacity/s"], figures["goodput"], figures["refused"]) == (20.0, 0.75, 0.5)
    assert figures["refusal p99 ms"] == 3.0 and figures["RSS grew"] == pytest.approx(0.1)
