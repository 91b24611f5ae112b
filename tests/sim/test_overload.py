"""A simulated cluster that is asked for more than it can do: what it does, whom it refuses, how much waits."""

import functools

import pytest

from engine.sim.overload import JOIN_S, ROWS, Crowd, capacity, overload

LAYOUTS = [("both",), ("prefill", "decode")]
SECONDS, IN_TIME_S = 60.0, 2.0


@functools.cache
def able(roles):
    return capacity(roles, SECONDS)


@pytest.mark.parametrize("times", [2, 10])
@pytest.mark.parametrize("roles", LAYOUTS, ids="-".join)
def test_a_cluster_asked_for_too_much_does_what_it_can(roles, times):
    """Costs about 4 s."""
    seen = overload(roles, times * able(roles), SECONDS, IN_TIME_S)
    assert seen.good(JOIN_S, JOIN_S + SECONDS, IN_TIME_S) > (0.92 if times == 2 else 0.88) * able(roles)
    assert len(seen.ended_at) == len(seen.waits) == seen.asked - len(seen.refused), "who was let in was served"
    assert sorted(seen.waits.values())[int(0.98 * len(seen.waits))] < IN_TIME_S
    assert seen.longest_queue < able(roles) * IN_TIME_S + 2 * ROWS
    assert all(0.0 < told.retry_s <= 2 * IN_TIME_S for told in seen.refused)


def test_a_cluster_asked_for_half_of_what_it_can_refuses_nobody():
    seen = overload(LAYOUTS[0], 0.5 * able(LAYOUTS[0]), 30.0, IN_TIME_S)
    assert not seen.refused and len(seen.ended_at) == seen.asked > 200


def test_a_crowd_that_is_let_in_without_a_limit_waits_ever_longer():
    crowd = Crowd(0, LAYOUTS[0], float("inf"))
    crowd.open(2 * able(LAYOUTS[0]), 20.0)
    crowd.run_until(crowd.now + 20.0)
    assert crowd.seen.longest_queue > 10 * able(LAYOUTS[0]) / 2 and not crowd.seen.refused
