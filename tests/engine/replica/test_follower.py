"""Followers that carry out orders, and two lanes over unequal processes whose KV crosses real links."""

import time

import numpy as np
import pytest

from engine.core.handoff import Parts
from engine.core.messages import FRONT, Fence
from engine.core.request import Request, Sampling
from engine.core.scheduler import LaneShape, Scheduler
from engine.movers.spans import Span, rank_name
from engine.replica import orders
from engine.replica.landing import Arrived
from engine.replica.orders import Key
from tests.engine.replica.processes import BLOCK, BLOCKS, CONTEXT, ROWS, STEP_TOKENS, VOCAB, Processes, until

pytestmark = pytest.mark.usefixtures("ending_threads")


@pytest.fixture
def make():
    """make(slot, tp, processes, heads) -> processes of a lane, which are ended."""
    made = []

    def make(slot="p0", tp=2, processes=2, kv_heads=1):
        made.append(Processes(slot, Span(tp, processes), kv_heads))
        return made[-1]

    yield make
    for each in made:
        each.close()


def plan(rows=1):
    made = Scheduler(LaneShape(BLOCKS, BLOCK, ROWS, STEP_TOKENS, CONTEXT, VOCAB), b"root")
    for k in range(rows):
        made.submit(Request(f"r{k}", (1, 2, 3, k), Sampling(seed=k)), k)
    return made.plan(0.0)


def said_there(lane):
    """What the follower ended with, and what the leader heard of it: the same."""
    reason = lane.lost_there[0].next()
    assert lane.losses.next() in (f"rank 1: {reason}", "rank 1: follower 1 has ended")
    return reason


def test_a_plan_out_of_turn_is_refused(make):
    lane = make()
    lane.followers.say(orders.Plan(1, plan()))
    lane.followers.say(orders.Plan(3, plan()))
    assert said_there(lane) == "plan: got number 3; expected 2"


def test_a_plan_for_a_lane_of_other_sizes_is_refused_before_it_runs(make):
    lane = make()
    odd = plan(2)
    rows = odd.rows.copy()
    rows[0, 0] = ROWS
    lane.followers.say(orders.Plan(1, type(odd)(odd.step, rows, *[getattr(odd, f) for f in list_of(odd)[2:]])))
    assert "past those of this lane" in said_there(lane) and not lane.devices[1].results


def list_of(step):
    return list(step.__dataclass_fields__)


@pytest.mark.parametrize("when", ["launch", "collect"])
def test_a_device_that_fails_there_is_told_by_its_class_alone(make, when):
    lane, first = make(), plan()
    getattr(lane.devices[1], f"fail_{when}").add(first.step)
    lane.followers.plan(first)
    assert said_there(lane) == "RuntimeError"


@pytest.mark.parametrize(
    "order", [orders.Forget("d1"), orders.Send("d1", 1, 0, 0, 1), orders.Known("d1", ("a:1",), 1)]
)
def test_nothing_is_about_other_lanes_before_the_lane_has_a_name(make, order):
    lane = make()
    lane.followers.say(order)
    assert said_there(lane) == f"order: got {type(order).__name__} before the lane has a name"


def test_an_answer_is_no_order(make):
    lane = make()
    lane.live("p0.a")
    lane.followers.say(orders.Drawn(1, 1))
    assert said_there(lane) == "order: got Drawn, which no follower takes"


def test_what_did_not_come_cannot_be_written(make):
    lane = make()
    lane.live("p0.a")
    lane.followers.say(orders.Drop(1, 2, 3))  # of what is not there, as both may have forgotten it
    lane.followers.say(orders.Scatter(1, 2, 3, (4,)))
    assert said_there(lane) == "KeyError"


def test_a_reset_waits_for_the_steps_before_it(make):
    lane = make()
    there, release = lane.devices[1], []
    collect = there.collect

    def slow():
        until(lambda: release)
        return collect()

    there.collect = slow
    lane.followers.plan(plan())
    until(lambda: there.results)
    lane.followers.say(orders.Reset())
    time.sleep(0.05)
    assert there.results, "still in flight"
    release.append(True)
    until(lambda: not there.results and (there.kv == -1).all())
    assert lane.losses.said.empty()


# -- moves ------------------------------------------------------------------------------------------------------


def move(source, target, handoff, blocks, into, generation=0):
    """Gather, send, take in and scatter, as lanes do; the part that the target's leader heard."""
    staged = source.lockstep.gather(blocks)
    part = Parts(handoff, generation, 0, len(blocks), staged)
    source.life.send(source.life.lane.name, target.life.lane.name, part)
    sender, heard = target.life.lane.heard.get(timeout=10)
    assert sender == source.life.lane.name and heard[:4] == part[:4]
    if heard.staged is not None:
        target.lockstep.scatter(into, heard.staged)
    return heard


def meet(one, other):
    """Both live, and know of each other."""
    for lane in (one, other):
        if lane.life is None:
            lane.live(f"{lane.slot}.a")
    one.meets(other)
    other.meets(one)


def fill(lane, seed):
    numbers = np.random.default_rng(seed).integers(0, 1 << 60, lane.devices[0].kv.shape)
    for each in lane.devices:
        each.kv[:] = numbers
    return numbers


SPANS = [((1, 1), (2, 2)), ((2, 2), (1, 1)), ((2, 2), (2, 2)), ((4, 2), (8, 4)), ((8, 4), (4, 2)), ((4, 4), (2, 1))]


def test_a_lane_says_where_its_processes_are_to_one_of_another_cluster(make):
    """Which holds a prompt for it."""
    holder, claimer = make("p0", 2, 1, 8), make("d1", 4, 2, 8)
    for lane in (holder, claimer):
        lane.live(f"{lane.slot}.a")
    claimer.meets(holder, foreign=True)
    until(lambda: "d1.a" in holder.life._moves._others)
    numbers = fill(holder, 7)
    move(holder, claimer, 12, [3, 9], [7, 2])
    for each in claimer.devices:
        until(lambda each=each: (each.kv[[7, 2]] == numbers[[3, 9]]).all())
    assert holder.life._moves._others.keys() == {"d1.a"}


@pytest.mark.parametrize("kv_heads", [1, 8])
@pytest.mark.parametrize("one, other", SPANS, ids=str)
def test_kv_goes_exact_from_any_span_to_any_other_and_back(make, one, other, kv_heads):
    """With one head all processes hold it and take turns; with eight each moves its own."""
    source, target = make("p0", *one, kv_heads), make("d1", *other, kv_heads)
    meet(source, target)
    numbers = fill(source, 5)
    move(source, target, 11, [3, 9, 4], [7, 2, 30])
    for each in target.devices:
        until(lambda each=each: (each.kv[[7, 2, 30]] == numbers[[3, 9, 4]]).all())
        assert (np.delete(each.kv, [7, 2, 30], axis=0) == -1).all()
    move(target, source, 12, [7], [20])
    for each in source.devices:
        until(lambda each=each: (each.kv[20] == numbers[3]).all())
    for lane in (source, target):
        assert lane.losses.said.empty() and not lane.life._wholes._open
        assert not any(there._held or there._gathered for there in lane.followers_there)


def test_what_arrived_and_nobody_writes_is_dropped_everywhere(make):
    source, target = make("p0", 1, 1), make("d1", 2, 2)
    meet(source, target)
    fill(source, 5)
    source.life.send("p0.a", "d1.a", Parts(5, 0, 0, 1, source.lockstep.gather([1])))
    _, heard = target.life.lane.heard.get(timeout=10)
    assert isinstance(heard.staged, Arrived) and list(target.followers_there[0]._held) == [Key(5, 0, 0)]
    del heard
    until(lambda: target.followers._forgotten)
    target.followers.say(orders.Gather((1,)))
    until(lambda: not target.followers_there[0]._held)


def test_heads_that_one_process_lacks_make_the_part_empty_and_the_next_asking_whole(make):
    """A follower of the target hears damage; its leader tells the lane, which would ask again."""
    source, target = make("p0", 2, 2, 8), make("d1", 2, 2, 8)
    meet(source, target)
    numbers = fill(source, 6)
    there = target.followers_there[0]
    landing, there._moves._landing = there._moves._landing, Damaged()
    assert move(source, target, 3, [5], [6]).staged is None
    there._moves._landing = landing
    move(source, target, 3, [5], [6], generation=1)
    for each in target.devices:
        until(lambda each=each: (each.kv[6] == numbers[5]).all())
    assert not [key for _, key in target.life._wholes._open if key.generation], "an older piece may come late"
    assert target.losses.said.empty()


class Damaged:
    """A landing to which everything comes damaged."""

    def heard(self, lane, part):
        return part._replace(staged=None)


def test_a_lane_that_is_born_again_has_new_links_everywhere_and_moves_kv_again(make):
    source, target = make("p0", 2, 2), make("d1", 2, 2)
    meet(source, target)
    numbers = fill(source, 7)
    there = target.followers_there[0]
    move(source, target, 1, [3], [4])
    there._held[Key(1, 2, 3)] = "of the life before"
    there._gathered.append("of the life before")
    before = target.addresses
    target.life.end()
    source.hears(Fence("d1.a"))
    target.lockstep.reset()
    target.live("d1.b")
    assert not there._held and not there._gathered and not set(target.addresses) & set(before)
    assert (
        there._moves.links.name == rank_name("d1.b", 1) and target.addresses[1] == there._moves.links.addresses[0]
    )
    meet(source, target)
    move(source, target, 2, [5], [4])
    for each in target.devices:
        until(lambda each=each: (each.kv[4] == numbers[5]).all())


def test_a_fenced_lane_is_forgotten_by_every_process(make):
    source, target = make("p0", 2, 2), make("d1", 2, 2)
    meet(source, target)
    every = [source.life._moves, source.followers_there[0]._moves]
    until(lambda: all("d1.a" in moves._others for moves in every))
    assert all({"d1.a", "d1.a/1"} <= set(moves.links._known) for moves in every)
    source.hears(Fence("d1.a"))
    until(lambda: not any("d1.a" in moves._others for moves in every))
    until(lambda: not any(name.startswith("d1.a") for moves in every for name in moves.links._known))
    heard = source.life.lane.heard.get(timeout=5)
    assert heard == (FRONT, Fence("d1.a")), "the lane hears of it, of nobody's addresses"


def test_the_addresses_of_a_lane_are_those_of_its_processes_by_rank(make):
    lane = make("p0", 4, 4)
    lane.live("p0.a")
    assert len(set(lane.addresses)) == 4
    assert lane.addresses[1:] == tuple(there._moves.links.addresses[0] for there in lane.followers_there)


def test_blocks_for_a_lane_that_a_process_does_not_know_hurt_nothing(make):
    source = make("p0", 2, 2)
    source.live("p0.a")
    source.life.send("p0.a", "gone", Parts(1, 0, 0, 1, source.lockstep.gather([1])))
    until(lambda: not source.followers_there[0]._gathered)
    source.lockstep.launch(plan())
    source.lockstep.collect()
    assert source.losses.said.empty()
