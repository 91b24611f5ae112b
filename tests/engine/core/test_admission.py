"""Admission: what a lane's queue and speed say of the wait, who is refused with which hint, and who never is."""

import math

import numpy as np
import pytest

from engine.core import admission
from engine.core.admission import UNKNOWN_PLACED, UNKNOWN_WAITING, Lane, Rate, Wait, admit, least_wait
from engine.core.events import Emission
from engine.core.messages import Load, Over, Submit
from engine.core.request import Request, Stopping
from engine.core.router import Router
from engine.errors import ResourceExhausted

ROWS, STEP = 4, 100


def report(running=0, waiting=0, blocks=1000, available=1000):
    values = dict.fromkeys(Load._fields, 0) | {"running": running, "waiting": waiting, "blocks": blocks}
    return Load(**values | {"available": available, "handoffs": (), "rows": ROWS, "step_tokens": STEP})


def lane(role="both", **values):
    return Lane("a", role, report(**values))


def serving(rate, waiting, **values):
    """A lane whose rows are all taken, where `waiting` more wait and `rate` end a second."""
    made = lane(**values)
    for number in range(ROWS):
        made.place(number, 1)
        made.drew(number)
    for number in range(ROWS, ROWS + 100 + waiting):
        made.place(number, 1)
    for number in range(100):
        made.run(1 / rate)
        made.leave(number)
        made.drew(number + ROWS)
    return made


def test_a_speed_is_unknown_until_enough_was_counted_in_time_that_passed():
    rate = Rate()
    for _ in range(3):
        rate.run(0.5)
        rate.count(1, 64)
    assert rate.per_s is None
    rate.run(0.5)
    rate.count(1, 64)
    assert rate.per_s == pytest.approx(2.0)


def test_a_speed_forgets_what_is_older_than_its_window():
    rate = Rate()
    for seconds in [1.0] * 50 + [0.1] * 20:
        rate.run(seconds)
        rate.count(3, 20)
    assert rate.per_s == pytest.approx(30.0) and rate.counts == 20
    rate.run(2.0)
    assert rate.per_s == pytest.approx(15.0), "a queue that stands still is slow"


def test_who_finds_a_free_row_and_room_in_a_step_starts_at_once():
    idle = lane()
    for number in range(ROWS - 1):
        assert idle.wait() == (0.0, 0.0)
        idle.place(number, 20)
    assert idle.wait() == (0.0, 0.0)


def test_one_long_prompt_alone_is_let_in_whatever_it_costs():
    idle = lane()
    admit(5.0, 0.001, 5.0, idle.wait())
    idle.place(1, 100_000)
    assert idle.wait().late_s == 0.0, "no speed is known, and rows are free"


def test_time_without_a_queue_teaches_nothing():
    made = serving(10.0, 5)
    before = made.wait()
    for number in range(100, 100 + ROWS + 5):
        made.leave(number)
    made.run(1000.0)
    for number in range(500, 500 + ROWS + 5):
        made.place(number, 1)
    assert made.wait().mean_s == pytest.approx(before.mean_s, rel=0.2)


def test_what_ends_while_nobody_waits_says_nothing_of_the_speed():
    made = serving(10.0, 0)
    before = made.ended.per_s
    for number in range(100, 100 + ROWS):
        made.leave(number)
    assert made.ended.per_s == before and not made.placed and not made.drawing


def test_the_wait_is_what_stands_before_over_what_ends_a_second():
    made = serving(10.0, 29)
    late_s, mean_s = made.wait()
    assert mean_s == pytest.approx(3.0, rel=0.05) and mean_s < late_s < 1.6 * mean_s


def test_prompt_tokens_that_no_step_can_take_are_waited_for():
    made = lane(role="prefill")
    for number in range(2):
        made.place(number, 2000)
    for number in range(2, 12):
        made.run(2.0)
        made.drew(number - 2)
        made.leave(number - 2)
        made.place(number, 2000)
    assert made.excess < 0 and made.tokens == 4000
    assert made.wait().mean_s == pytest.approx(4.0)


def test_while_no_speed_is_known_a_bounded_number_may_wait():
    made = lane()
    for number in range(ROWS + UNKNOWN_WAITING):
        assert made.wait().late_s == 0.0
        made.place(number, 1)
    assert made.wait().late_s == (UNKNOWN_WAITING + 1) / admission.UNKNOWN_PER_S


def test_a_lane_that_has_not_reported_takes_a_bounded_number():
    made = Lane("a", "both")
    for number in range(UNKNOWN_PLACED):
        assert made.wait().late_s == 0.0
        made.place(number, 1)
    assert made.wait().late_s == math.inf


def test_a_full_pool_counts_as_rows_that_are_taken():
    roomy, crowded = lane(running=2, waiting=1), lane(running=2, waiting=1, available=10)
    assert (roomy.rows, crowded.rows) == (ROWS, 2)


def test_what_leaves_before_it_drew_says_nothing_of_the_speed():
    made = serving(10.0, 29)
    before = made.wait().mean_s
    for number in range(ROWS + 100, ROWS + 110):
        made.leave(number)
    assert made.wait().mean_s == pytest.approx(before * 20 / 30, rel=0.01)
    made.leave(12345)


def test_a_refusal_names_the_limit_what_was_found_and_when_to_come_again():
    with pytest.raises(ResourceExhausted, match=r"got a wait of 7 s .* at most 5 s; try again in 4 s") as got:
        admit(100.0, 5.0, None, Wait(7.0, 4.0))
    assert (got.value.field, got.value.retry_after_s) == ("max_wait", 4.0)
    admit(100.0, 7.0, None, Wait(7.0, 4.0))
    with pytest.raises(ResourceExhausted, match="try again in 5 s"):
        admit(100.0, 5.0, None, Wait(70.0, 40.0))


def test_a_deadline_sooner_than_the_first_token_is_refused():
    with pytest.raises(ResourceExhausted, match="deadline") as got:
        admit(100.0, 30.0, 102.0, Wait(3.0, 2.5))
    assert got.value.field == "deadline" and got.value.retry_after_s == 2.5
    admit(100.0, 30.0, 103.0, Wait(3.0, 2.5))
    admit(100.0, 30.0, 99.0, Wait(0.0, 0.0))


def test_without_a_longest_wait_everybody_is_let_in():
    front = Front(math.inf, "a")
    for _ in range(20 * ROWS):
        front.ask(deadline_at=0.5)
    assert len(front.router.journeys) == 20 * ROWS


def test_the_best_way_over_the_lanes_counts():
    free, slow, slower = lane(), serving(10.0, 29), serving(5.0, 29)
    assert least_wait([free, slow], [], []) == free.wait()
    assert least_wait([], [free], [slow, slower]) == slow.wait(), "one of two queues is empty"
    assert least_wait([slower], [slow], [free]) == slow.wait()


# -- the router's use of it ---------------------------------------------------------------------------------------


class Front:
    """A router whose lanes the test plays: each choice draws one token and ends a second later."""

    def __init__(self, max_wait_s, *lanes):
        self.router, self.now = Router(4, 256), 0.0
        self.router.max_wait_s = max_wait_s
        for name in lanes:
            self.router.lane_up(name, "both")
            self.router.receive(name, report())

    def ask(self, deadline_at=None):
        request = Request("r", (1, 2, 3), stopping=Stopping(max_tokens=9), deadline_at=deadline_at)
        return self.router.submit(request, 0, self.now)

    def fill(self):
        """Ask until it is refused; what was raised."""
        for _ in range(1000):
            try:
                self.ask()
            except ResourceExhausted as error:
                return error
        raise AssertionError("nothing was refused")

    def end(self, journey):
        """A row is left, after `1 / ROWS` seconds."""
        (track,) = journey.tracks
        target = self.router._legs[track.serial].target
        self.now += 1 / ROWS
        self.router.tick(self.now)
        if not track.tokens:
            self.router.receive(target, Emission(*(np.array([x]) for x in (track.serial, 5, 3))))
        self.router.receive(target, Over(track.serial, "length", None, None))


def test_a_router_lets_in_what_is_served_in_time_and_hints_when_to_come_again():
    front = Front(5.0, "a")
    error = front.fill()
    assert len(front.router.journeys) == ROWS + UNKNOWN_WAITING and error.retry_after_s == 5.0, "no speed is known"
    for _ in range(80):
        front.end(next(iter(front.router.journeys)))
        front.fill()
    error, waiting = front.fill(), len(front.router.journeys) - ROWS
    assert 1.5 * ROWS < waiting < 5.0 * ROWS, "of what ends in 5 s some may wait"
    assert error.retry_after_s == pytest.approx((waiting + 1) / ROWS, rel=0.1) and error.field == "max_wait"
    front.router.check()


def test_a_deadline_before_the_queue_is_served_is_refused_and_nothing_of_it_remembered():
    front = Front(30.0, "a")
    for _ in range(ROWS + UNKNOWN_WAITING):
        front.ask()
    for _ in range(20):
        front.end(next(iter(front.router.journeys)))
        front.ask()
    known = len(front.router.journeys)
    with pytest.raises(ResourceExhausted, match="deadline"):
        front.ask(deadline_at=front.now + 0.5)
    front.ask(deadline_at=front.now + 25.0)
    assert len(front.router.journeys) == known + 1 and len(front.router._deadlines) == 1


def test_what_a_lost_lane_served_goes_on_however_long_it_waits():
    front = Front(5.0, "a", "b")
    front.fill()
    known = len(front.router.journeys)
    front.router.outbox.clear()
    front.router.lane_lost("a")
    moved = [message for lane, message in front.router.outbox if lane == "b" and isinstance(message, Submit)]
    assert front.router.recoveries == len(moved) == known // 2 and len(front.router.journeys) == known
    assert len(front.router.lanes["b"].placed) == known
    with pytest.raises(ResourceExhausted):
        front.ask()


def test_a_lane_is_as_empty_as_before_when_everything_is_over():
    front = Front(5.0, "a", "b")
    front.fill()
    for k, journey in enumerate(list(front.router.journeys)):
        front.end(journey) if k % 2 else front.router.cancel(journey)
    assert not front.router.journeys
    for lane in front.router.lanes.values():
        assert not lane.placed and not lane.drawing and lane.tokens == 0
