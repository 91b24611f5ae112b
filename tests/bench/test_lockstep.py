import json

import pytest

from bench import lockstep
from bench.lockstep import figures, main, plan_of, planned_s
from bench.lockstep_child import BOUNDS
from engine.core.plan import BLOCK
from engine.observe.plan_bytes import check_plan, decode_plan, encode_plan


def test_a_plan_is_a_decode_step_that_a_follower_takes():
    plan = plan_of(64, 7)
    check_plan(decode_plan(encode_plan(plan)), BOUNDS)
    assert plan.one_token and plan.num_points == 64 and int((plan.rows[:, BLOCK] > 0).sum()) == 4


def test_the_planned_step_reads_an_eighth_of_eight_billion_weights():
    assert abs(planned_s() / (16e9 / 8 / 4.8e12) - 1) < 0.06


def test_shares_are_of_the_steps_beside_them():
    middle = {("leader", 4, 2): 50.0, ("late", 4, 2): 90.0, ("said", 4, 0): 20.0, ("heard", 4, 0): 200.0}
    row = figures(middle | {("step", 4, 0): 2.0}, 4, 2)
    assert (row["leader % CPU"], row["said % CPU"]) == (2.5, 1.0)
    assert row["leader % H200"] == pytest.approx(5 / row["H200 read ms"])


def test_leader_and_followers_and_front_are_timed(tmp_path, monkeypatch):
    """Two followers and a front in processes of their own; the decode step is another bench's."""
    monkeypatch.setattr(lockstep, "decode_steps", lambda rows: dict.fromkeys(rows, lambda: None))
    monkeypatch.setattr(lockstep, "ROWS", (1, 64))
    monkeypatch.setattr(lockstep, "FOLLOWERS", (1, 2))
    monkeypatch.setattr(lockstep, "REPEATS", 2)
    out = tmp_path / "figures.jsonl"
    assert main(["--turns", "1", "--out", str(out)]) == 0
    rows = [json.loads(line)["figures"] for line in out.read_text().splitlines()]
    assert [(row["rows"], row["followers"]) for row in rows] == [(1, 1), (1, 2), (64, 1), (64, 2)]
    assert all(row[what] > 0 for row in rows for what in ("leader us", "said us", "heard us"))
