"""Gauges of lanes and of all of them together."""

import pytest

from engine.replica.loads import FIELDS, HANDOFFS, READY, STARTING, LaneLoad, block_states, gauges, totals


@pytest.fixture
def life(make_life):
    """A prefill and a decode lane that have handed a prompt on."""
    life = make_life(roles=("prefill", "decode"))
    life.submit("a", prompt="x" * 400, max_tokens=3)
    return life


def test_every_lane_tells_its_own_and_the_replica_their_sum(life):
    for _ in range(40):
        prefill, decode = life.replica.lane_loads()
        assert (prefill.name, prefill.role, prefill.state) == ("p0", "prefill", READY)
        assert (decode.name, decode.role, decode.state) == ("d1", "decode", READY)
        load = life.replica.load()
        for name in (*FIELDS, *HANDOFFS):
            assert load[name] == prefill.gauges[name] + decode.gauges[name]
        assert sum(block_states(load).values()) == load["blocks"]
        life.turn()
    assert load["lanes"] == 2 and load["handoffs_started"] == 1 and load["generated_tokens"] == 3
    life.replica.block_bytes = 64
    life.replica.refresh()
    assert life.replica.metrics.value("moved_bytes") == 64 * load["moved_blocks"]
    assert load["moved_blocks"] > 0 and decode.gauges["moved_blocks"] + prefill.gauges["moved_blocks"] > 0


def test_a_lane_that_is_being_started_is_shown_and_not_counted(life):
    life.replica.absent = lambda present: [LaneLoad("d2", "decode", STARTING)] if "d1" in present else []
    assert [lane.state for lane in life.replica.lane_loads()] == [READY, READY, STARTING]
    assert life.replica.load()["lanes"] == 2


def test_a_lane_that_was_lost_is_gone_and_what_it_held_is_not_counted(life):
    one = gauges(life.replica.lanes[0].agent.load())
    life.replica.router.lane_lost("d1")
    assert [lane.name for lane in life.replica.lane_loads()] == ["p0"]
    assert life.replica.load()["blocks"] == one["blocks"]


def test_without_lanes_every_gauge_is_there():
    assert totals([]) == dict.fromkeys([*FIELDS, *HANDOFFS], 0.0)
    assert totals([LaneLoad("p0", "prefill", STARTING)]) == totals([])
