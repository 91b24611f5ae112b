"""The leader's view of its followers: same plans, same draws, or the lane is lost with a sentence that says why."""

import threading
import time

import numpy as np
import pytest

from engine.core.plan import StepResult
from engine.core.request import Request, Sampling
from engine.core.scheduler import LaneShape, Scheduler
from engine.errors import DeviceError, GroupLost, Misfit
from engine.movers.spans import Span
from engine.replica import followers as module
from engine.replica import orders
from engine.replica.followers import Followers, Lockstep
from engine.replica.landing import Arrived
from tests.engine.replica.processes import (
    BLOCK,
    BLOCKS,
    CONTEXT,
    ROWS,
    STEP_TOKENS,
    VOCAB,
    Losses,
    Lost,
    Processes,
    device,
    until,
)

pytestmark = pytest.mark.usefixtures("ending_threads")
PROMPTS = [(1, 2, 3, 4, 5, 6, 7), (9,) * 20, (5, 6), (11, 12, 13, 14, 15)]


@pytest.fixture
def make():
    """Processes of a lane, which are ended."""
    made = []

    def make(processes, **options):
        made.append(Processes("p0", Span(processes, processes), **options))
        return made[-1]

    yield make
    for each in made:
        each.close()


def scheduler():
    made = Scheduler(LaneShape(BLOCKS, BLOCK, ROWS, STEP_TOKENS, CONTEXT, VOCAB), b"root")
    for k, prompt in enumerate(PROMPTS):
        made.submit(Request(f"r{k}", prompt, Sampling(seed=k)), k)
    return made


def steps(lane, planned, count, in_flight=2):
    """Run so many steps as a lane does, some in flight; what they drew."""
    flying, drawn = 0, []
    for _ in range(count):
        if flying == in_flight:
            drawn.append(lane.collect())
            planned.collect(drawn[-1])
            flying -= 1
        if (plan := planned.plan(0.0)) is not None:
            lane.launch(plan)
            flying += 1
    for _ in range(flying):
        drawn.append(lane.collect())
        planned.collect(drawn[-1])
    return [(each.step, each.tokens.tolist()) for each in drawn]


class Answers:
    """A follower's channel in the hands of a test."""

    peer = "follower"

    def __init__(self, *first):
        self.heard, self.sent, self._over = [], [], threading.Event()
        self._ready, self._lock = list(first), threading.Condition()

    def send(self, data):
        time.sleep(0)  # lets another thread in between
        self.sent.append(data)

    def answer(self, *what):
        with self._lock:
            self._ready += what
            self._lock.notify_all()

    def receive(self):
        with self._lock:
            self._lock.wait_for(lambda: self._ready or self._over.is_set())
            if self._over.is_set():
                raise GroupLost("closed")
            return self._ready.pop(0)

    def close(self):
        with self._lock:
            self._over.set()
            self._lock.notify_all()


@pytest.fixture(autouse=True)
def closed(monkeypatch):
    """No thread of a leader outlives its test."""
    made, begin = [], Followers.__init__

    def kept(self, *about):
        begin(self, *about)
        made.append(self)

    monkeypatch.setattr(Followers, "__init__", kept)
    yield
    for each in made:
        each.close()


@pytest.fixture
def two():
    """Two followers that answer what the test says, and the leader's view of them."""
    answers, losses = [Answers(), Answers()], Losses()
    return answers, Followers(answers, losses), losses


def result(*tokens):
    return StepResult(1, np.array(tokens, np.int32), np.ones(len(tokens), bool))


def plans(followers, count):
    planned = scheduler()
    for _ in range(count):
        followers.plan(planned.plan(0.0))


@pytest.mark.parametrize("processes", [1, 2, 3, 4])
def test_all_processes_draw_what_one_draws(make, processes):
    lane = make(processes)
    assert steps(lane.lockstep, scheduler(), 30) == steps(device(), scheduler(), 30)
    lane.settle()
    until(lambda: not lane.followers._ours and not lane.followers._theirs)
    for other in lane.devices[1:]:
        assert (other.kv == lane.devices[0].kv).all() and (other.history == lane.devices[0].history).all()
    assert lane.losses.said.empty()


@pytest.mark.parametrize("rank", [1, 2])
def test_a_follower_that_draws_other_tokens_is_named(make, rank):
    lane = make(3)
    lane.devices[rank].vocab -= 1
    with pytest.raises(Lost, match=rf"plan \d+: rank {rank} drew other tokens than rank 0"):
        for _ in range(50):
            steps(lane.lockstep, scheduler(), 4)
            time.sleep(0.01)
            raise_if_lost(lane)


def raise_if_lost(lane):
    if not lane.losses.said.empty():
        raise Lost(lane.losses.next())


def test_digests_are_compared_whoever_is_first(two):
    answers, followers, losses = two
    plans(followers, 2)
    good = orders.digest(result(1, 2))
    answers[0].answer(orders.Drawn(1, good))
    until(lambda: followers._theirs)
    followers.drew(result(1, 2))
    answers[1].answer(orders.Drawn(1, good))
    until(lambda: not followers._theirs)
    followers.drew(result(3))
    answers[1].answer(orders.Drawn(2, good))
    assert losses.next() == "plan 2: rank 2 drew other tokens than rank 0"


def test_a_follower_that_runs_ahead_of_what_is_collected_here_is_noticed(two):
    answers, _, losses = two
    answers[1].answer(*(orders.Drawn(k, 0) for k in range(1, module.AHEAD + 2)))
    assert losses.next() == f"rank 2 has run {module.AHEAD} plans that this process has not seen the end of"


def test_an_answer_that_is_an_order_and_one_that_cannot_go_on_end_the_lane(two):
    answers, _, losses = two
    answers[0].answer(orders.Unable("it is full"))
    answers[1].answer(orders.Reset())
    assert {losses.next(), losses.next()} == {"rank 1: it is full", "rank 2 answered with an order"}


def test_a_follower_that_ends_is_named_unless_we_end(make):
    lane = make(3)
    lane.followers_there[1]._channel.close()
    assert lane.losses.next().startswith("rank 2: follower 2")
    other = make(2)
    other.followers.close()
    assert other.lost_there[0].next().startswith("the leader")
    assert other.losses.said.empty()


def test_orders_are_said_to_all_in_the_same_order_whoever_says_them(two):
    answers, followers, _ = two
    threads = [
        threading.Thread(target=lambda k=k: [followers.say(orders.Drop(k, j, 0)) for j in range(200)])
        for k in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers[0].sent == answers[1].sent and len(answers[0].sent) == 800


def test_what_is_forgotten_is_told_before_the_next_order(two):
    answers, followers, _ = two
    followers.forget(orders.Key(1, 2, 3))
    followers.forget(orders.Key(4, 5, 6))
    assert not answers[0].sent
    followers.say(orders.Go())
    drops = [orders.to_frame(orders.Drop(*key)) for key in ((4, 5, 6), (1, 2, 3))]
    assert answers[0].sent == [b"".join([*drops, orders.to_frame(orders.Go())])]


def test_all_wait_until_each_has_come_so_far_with_the_same(two):
    answers, followers, losses = two
    done = threading.Event()
    thread = threading.Thread(target=lambda: (followers.together("programs 1"), done.set()))
    thread.start()
    answers[1].answer(orders.Here("programs 1"))
    assert not done.wait(0.05)
    answers[0].answer(orders.Here("programs 1"))
    assert done.wait(5)
    thread.join()
    assert all(each.sent == [orders.to_frame(orders.Go())] for each in answers)
    answers[0].answer(orders.Here("programs 1"))
    answers[1].answer(orders.Here("programs 2"))
    with pytest.raises(Misfit, match="rank 2 has programs 2 where rank 0 has programs 1"):
        followers.together("programs 1")


def test_a_birth_tells_the_name_and_waits_for_fresh_addresses_by_rank(two):
    answers, followers, _ = two
    answers[0].answer(orders.At(("stale",)))
    until(lambda: followers._waited[orders.At])
    found = []
    thread = threading.Thread(target=lambda: found.append(followers.born("p0.b")))
    thread.start()
    until(lambda: answers[1].sent)
    answers[1].answer(orders.At(("there:2", "more")))
    answers[0].answer(orders.At(("there:1",)))
    thread.join(5)
    assert found == [("there:1", "there:2")] and answers[0].sent == [orders.to_frame(orders.Born("p0.b"))]


def test_a_step_that_does_not_end_is_noticed(monkeypatch):
    monkeypatch.setattr(module, "LOOK_S", 0.01)
    monkeypatch.setattr(module, "STUCK_S", 0.15)
    losses = Losses()
    followers = Followers([Answers()], losses)
    began = time.monotonic()
    plans(followers, 2)
    assert losses.next() == "a step has not ended for 0 s" and time.monotonic() - began >= 0.15


def test_steps_that_end_in_time_are_no_loss(monkeypatch):
    monkeypatch.setattr(module, "LOOK_S", 0.01)
    monkeypatch.setattr(module, "STUCK_S", 0.2)
    losses = Losses()
    followers = Followers([Answers()], losses)
    for _ in range(4):
        plans(followers, 1)
        time.sleep(0.08)
        followers.drew(result(1))
    assert losses.said.empty()


def test_what_raises_here_at_launch_after_the_others_have_begun_ends_the_lane(make):
    lane = make(2)
    plan = scheduler().plan(0.0)
    lane.devices[0].fail_launch.add(plan.step)
    with pytest.raises(Lost, match=f"step {plan.step} raised before launch: RuntimeError"):
        lane.lockstep.launch(plan)


def test_a_step_that_fails_here_ends_the_lane_of_several_processes(make):
    lane = make(2)
    plan = scheduler().plan(0.0)
    lane.devices[0].fail_collect.add(plan.step)
    lane.lockstep.launch(plan)
    with pytest.raises(Lost, match="a step failed: RuntimeError"):
        lane.lockstep.collect()


def test_a_reset_while_steps_are_in_flight_leaves_all_processes_empty_and_serving(make):
    lane = make(3)
    assert steps(lane.lockstep, scheduler(), 5) == steps(device(), scheduler(), 5)
    planned = scheduler()
    for _ in range(2):
        lane.lockstep.launch(planned.plan(0.0))
    lane.lockstep.reset()
    assert not lane.followers._since
    until(lambda: all((each.kv == -1).all() and not each.results for each in lane.devices))
    assert steps(lane.lockstep, scheduler(), 20) == steps(device(), scheduler(), 20)
    lane.settle()
    until(lambda: not lane.followers._ours and not lane.followers._theirs)
    assert lane.losses.said.empty()
    assert all((other.kv == lane.devices[0].kv).all() for other in lane.devices)


def test_digests_of_steps_that_nobody_collects_are_dropped(two):
    answers, followers, losses = two
    plans(followers, 3)
    followers.drew(result(1))
    answers[0].answer(orders.Drawn(1, orders.digest(result(1))), orders.Drawn(2, 5))
    until(lambda: 2 in followers._theirs)
    followers.over()
    answers[1].answer(*(orders.Drawn(k, 9) for k in (1, 2, 3)))
    answers[0].answer(orders.Drawn(3, 7), orders.Unable("the last"))
    assert losses.next() == "rank 1: the last" and not followers._theirs and not followers._ours
    assert losses.said.empty()


def test_blocks_that_are_read_and_written_are_so_everywhere(make):
    lane = make(2)
    for each in lane.devices:
        each.kv[:] = np.arange(each.kv.size).reshape(each.kv.shape)
    staged = lane.lockstep.gather([3, 5])
    assert (staged == lane.devices[0].kv[[3, 5]]).all()
    key = orders.Key(1, 0, 0)
    lane.followers_there[0]._held[key] = staged
    lane.lockstep.scatter([7, 8], Arrived(key, staged, lane.followers.forget))
    until(lambda: (lane.devices[1].kv[[7, 8]] == staged).all())
    assert (lane.devices[0].kv[[7, 8]] == staged).all() and not lane.followers_there[0]._held


def test_a_lane_of_one_process_says_nothing_to_anybody():
    followers = Followers((), pytest.fail)
    lane = Lockstep(device(), followers, pytest.fail)
    assert steps(lane, scheduler(), 12) == steps(device(), scheduler(), 12)
    followers.forget(orders.Key(1, 2, 3))
    assert followers.born("p0.a") == () and not followers._forgotten and not followers._ours
    followers.together("anything")


def test_an_error_of_the_device_keeps_its_class_where_nothing_is_lost():
    """With a `lost` that returns, which a test alone has, what the device raised goes on."""
    failing = device()
    lane = Lockstep(failing, Followers((), lambda reason: None), lambda reason: None)
    failing.collect = lambda: (_ for _ in ()).throw(DeviceError("gone"))
    with pytest.raises(DeviceError, match="gone"):
        lane.collect()
