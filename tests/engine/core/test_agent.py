"""Lanes that hand prompts to each other, with hash devices and a network that does what the test says."""

import random

import pytest

from engine.core import handoff, prefix
from engine.core.agent import Agent, Gather
from engine.core.events import Emission
from engine.core.handoff import State
from engine.core.messages import FRONT, Cancel, Committed, Expect, Failed, Fence, Hold, Over, Prefill, Submit
from engine.core.request import Request, Sampling, Stopping
from engine.core.scheduler import LaneShape, Scheduler
from engine.core.sequence import Part
from engine.sim.runner import ModelledRunner, alone

VOCAB, EOS, BLOCK = 997, 996, 4


class Place:
    """A lane with its device, turned by hand."""

    def __init__(self, name, num_blocks=60, max_tokens=16):
        shape = LaneShape(num_blocks, BLOCK, 4, max_tokens, 64, VOCAB, (EOS,))
        self.agent = Agent(name, Scheduler(shape, prefix.root("test")))
        self.device = ModelledRunner(num_blocks, BLOCK, 4, 64, VOCAB)

    def turn(self, now):
        agent, device = self.agent, self.device
        plan = agent.plan(now)
        sent = []
        for work in agent.work:
            if isinstance(work, Gather):
                sent.append((work.peer, work.part._replace(staged=device.gather(work.blocks))))
            else:
                device.scatter(work.blocks, work.staged)
        agent.work.clear()
        if plan is not None:
            device.launch(plan)
        elif agent.scheduler.flights:
            step = agent.scheduler.flights[0].plan.step
            try:
                result = device.collect()
            except RuntimeError as error:
                device.reset()
                agent.fail(step, str(error))
            else:
                agent.collect(result)
        agent.check()
        sent += agent.outbox
        agent.outbox = []
        return sent

    @property
    def restored(self):
        pool = self.agent.scheduler.pool
        return pool.available == pool.usable and pool.writing == 0 and self.agent.idle


class Pair:
    """A prefill and a decode lane; `passes(message)` says whether a message between them arrives."""

    def __init__(self, passes=lambda message: True, **sizes):
        self.places = {"p": Place("p", **sizes), "d": Place("d", **sizes)}
        self.passes, self.now = passes, 0.0
        self.front: list = []
        self.tokens: dict[int, list[int]] = {}

    def say(self, lane, message):
        self.places[lane].agent.receive(self.now, FRONT, message)

    def hand(self, handoff_id, serial, ids, seed=1, emitted=(), **options):
        request = Request(f"r{serial}", tuple(ids), Sampling(seed=seed), Stopping(**options))
        parts = (Part(serial, 0, tuple(emitted)),)
        self.say("d", Expect(handoff_id, "p", Submit(request, seed, parts)))
        prompt = Request(f"r{serial}", tuple(ids) + tuple(emitted), Sampling(temperature=0.0), Stopping(1))
        self.say("p", Prefill(handoff_id, "d", prompt))
        return request

    def turn(self, step_s=0.05):
        self.now += step_s
        for name, place in self.places.items():
            for peer, message in place.turn(self.now):
                if peer == FRONT:
                    self.front.append(message)
                    if isinstance(message, Emission):
                        for serial, token in zip(message.serials.tolist(), message.tokens.tolist(), strict=True):
                            self.tokens.setdefault(serial, []).append(token)
                elif self.passes(message):
                    self.places[peer].agent.receive(self.now, name, message)

    def run(self, turns=400):
        for _ in range(turns):
            self.turn()
            if all(place.agent.idle for place in self.places.values()):
                return self
        raise AssertionError("stuck")

    def told(self, kind):
        return [message for message in self.front if isinstance(message, kind)]

    @property
    def restored(self):
        return all(place.restored for place in self.places.values())


def ids(length, seed=0):
    return random.Random(seed).choices(range(VOCAB - 1), k=length)


def expected(request, seed, count):
    lone = Place("x").agent.scheduler.submit(request, seed)[0]
    return alone(list(request.prompt_ids), lone.draw, count, VOCAB)


@pytest.mark.parametrize("length", [2, 4, 5, 8, 9, 23, 33])
def test_a_prompt_computed_on_one_lane_decodes_on_another_token_for_token(length):
    pair = Pair()
    request = pair.hand(100, 1, ids(length), max_tokens=7)
    pair.run()
    assert pair.tokens[1] == expected(request, 1, 7) and pair.restored
    assert [over.reason for over in pair.told(Over)] == ["length"]
    assert pair.places["p"].agent.moved_blocks == -(-(length - 1) // BLOCK)


def test_the_decode_lane_computes_one_token_of_the_prompt_only():
    pair = Pair()
    pair.hand(100, 1, ids(23), max_tokens=3)
    pair.run()
    assert pair.places["d"].agent.steps <= 4 and pair.places["d"].agent.scheduler.rows.era == 1


def test_blocks_that_the_decode_lane_knows_do_not_move():
    pair = Pair()
    pair.hand(100, 1, ids(23), max_tokens=3)
    pair.run()
    moved = pair.places["p"].agent.moved_blocks
    request = pair.hand(101, 2, [*ids(23), 5, 6, 7], max_tokens=3)
    pair.run()
    assert pair.places["p"].agent.moved_blocks - moved == 2, "only what follows the shared five blocks"
    assert pair.tokens[2] == expected(request, 1, 3) and pair.restored


def test_a_sequence_goes_on_elsewhere_from_the_tokens_it_has_drawn():
    pair = Pair()
    request = pair.hand(100, 1, ids(9), max_tokens=12)
    want = expected(request, 1, 12)
    pair.run()
    pair.hand(101, 2, ids(9), emitted=want[:5], max_tokens=12)
    pair.run()
    assert pair.tokens[2] == want[5:]


@pytest.mark.parametrize("lost", range(8))
def test_a_lost_message_costs_time_only(lost):
    seen = []

    def passes(message):
        seen.append(message)
        return len(seen) - 1 != lost

    pair = Pair(passes)
    request = pair.hand(100, 1, ids(40), max_tokens=4)
    pair.run(3000)
    assert pair.tokens[1] == expected(request, 1, 4) and pair.restored


def test_damaged_parts_are_asked_for_again_and_too_many_end_the_attempt():
    for times, whole in ((2, True), (9, False)):
        left = [times]
        pair = Pair()

        def damage(message, left=left, pair=pair):
            if isinstance(message, handoff.Parts) and left[0]:
                left[0] -= 1
                pair.places["d"].agent.receive(pair.now, "p", message._replace(staged=None))
                return False
            return True

        pair.passes = damage
        request = pair.hand(100, 1, ids(20), max_tokens=4)
        pair.run(3000)
        assert pair.restored and pair.places["d"].agent.load().asked_again == 2
        assert (pair.tokens.get(1) == expected(request, 1, 4)) == whole
        assert [failed.reason for failed in pair.told(Failed)] == (
            [] if whole else ["3 parts in a row came damaged"]
        )


@pytest.mark.parametrize("turns", range(14))
def test_a_cancel_at_any_moment_gives_every_block_back(turns):
    pair = Pair()
    pair.hand(100, 1, ids(33), max_tokens=9)
    for _ in range(turns):
        pair.turn()
    for lane in ("d", "p"):
        pair.say(lane, Cancel((1,), 100, "abort"))
        pair.say(lane, Cancel((1,), 100, "abort"))
    pair.run()
    assert pair.restored and len(pair.told(Over)) <= 1


def test_cancelled_blocks_stay_in_quarantine_until_the_source_answers_or_is_fenced():
    for fenced in (False, True):
        pair = Pair(lambda message: not isinstance(message, handoff.Parts | handoff.Stop))
        pair.hand(100, 1, ids(33), max_tokens=9)
        for _ in range(10):
            pair.turn()
        pair.say("d", Cancel((1,), 100, "abort"))
        for _ in range(20):
            pair.turn()
        load = pair.places["d"].agent.load()
        assert load.quarantined == load.writing == 9 and dict(load.handoffs)["quarantined"] == 1
        if fenced:
            pair.say("d", Fence("p"))
            pair.say("p", Cancel((), 100, "abort"))
        else:
            pair.passes = lambda message: True
        pair.run()
        assert pair.restored


def test_a_part_of_an_earlier_asking_is_not_taken():
    late = []

    def passes(message):
        if isinstance(message, handoff.Parts) and not late:
            late.append(message)
            return False
        return True

    pair = Pair(passes)
    request = pair.hand(100, 1, ids(60), max_tokens=4)
    target = pair.places["d"].agent.targets[100]
    for _ in range(40):
        if target.generation == 2 and target.state is State.RESERVED:
            break
        pair.turn()
    before = target.have, len(pair.places["d"].agent.work)
    pair.places["d"].agent.receive(pair.now, "p", late[0])
    assert (target.have, len(pair.places["d"].agent.work)) == before and target.state is State.RESERVED
    pair.run()
    assert pair.tokens[1] == expected(request, 1, 4)


def test_a_device_failure_on_either_side_loses_nothing():
    for side in ("p", "d"):
        for step in range(4):
            pair = Pair(max_tokens=8)
            pair.places[side].device.fail_collect.add(step)
            request = pair.hand(100, 1, ids(30), max_tokens=6)
            pair.run(3000)
            again = [failed.reason for failed in pair.told(Failed)]
            if again:
                pair.hand(101, 1, ids(30), emitted=pair.tokens.get(1, []), max_tokens=6)
                pair.run(3000)
            assert pair.tokens[1] == expected(request, 1, 6) and pair.restored, (side, step, again)


def test_a_choice_held_when_its_kv_has_come_draws_nothing_until_it_is_let_go():
    pair = Pair()
    request = pair.hand(100, 1, ids(23), max_tokens=6)
    while not pair.told(Committed):
        pair.turn()
    pair.say("d", Hold((1,), True))
    for _ in range(20):
        pair.turn()
    assert len(pair.tokens.get(1, [])) <= 1 and not pair.told(Over)
    pair.say("d", Hold((1,), False))
    pair.run()
    assert pair.tokens[1] == expected(request, 1, 6) and pair.restored


@pytest.mark.parametrize("last", [handoff.Done(100), handoff.Stop(100)])
def test_a_last_word_about_what_a_lane_does_not_know_is_answered_and_leaves_nothing(last):
    place = Place("p")
    for _ in range(2):
        place.agent.receive(0.0, "d", last)
    answer = handoff.Stopped(100, "unknown") if isinstance(last, handoff.Stop) else handoff.Released(100)
    assert place.turn(0.1) == [("d", answer), ("d", answer)] and place.restored


def test_an_offer_that_overtakes_the_first_word_is_kept_for_it():
    place = Place("d")
    place.agent.receive(0.0, "p", handoff.Offer(100))
    assert place.turn(0.1) == []
    request = Request("r", tuple(ids(9)), Sampling(), Stopping(max_tokens=1))
    place.agent.receive(0.2, FRONT, Expect(100, "p", Submit(request, 1, (Part(1),)), b"ticket"))
    assert place.turn(0.3) == [("p", handoff.Fetch(100, 1, 0, 2, b"ticket"))]


def test_a_lane_reserves_nothing_before_the_prompt_has_its_blocks():
    pair = Pair(max_tokens=8)
    for k in range(4):  # every row is taken
        request = Request(f"{k}", tuple(ids(40, k)), Sampling(seed=1), Stopping(max_tokens=1))
        pair.say("p", Submit(request, 1, (Part(k + 1),)))
    pair.hand(100, 9, ids(23), max_tokens=2)
    target, source = pair.places["d"].agent.targets[100], pair.places["p"].agent.sources[100]
    seen = set()
    while target.state is not State.COMMITTED:
        pair.turn()
        assert source.seated or target.state is State.OFFERED
        seen.add((source.ready < source.total, target.state))
    assert (True, State.OFFERED) in seen and (True, State.COPYING) in seen, (
        "it waits, then moves while it is computed"
    )


def test_blocks_that_are_given_up_as_they_are_asked_for_are_offered_again():
    late = []

    def passes(message):
        mine = isinstance(message, handoff.Fetch) and message.handoff == 100
        if mine:
            late.append(message)
        return not mine

    pair = Pair(passes, num_blocks=13)
    pair.places["d"] = Place("d")
    request = pair.hand(100, 1, ids(23), max_tokens=3)
    for _ in range(4):
        pair.turn()
    older = Request("older", tuple(ids(30, 1)), Sampling(seed=1), Stopping(max_tokens=3))
    pair.say("p", Expect(50, "d", Submit(older, 1, (Part(2),))))
    pair.say("d", Prefill(50, "p", older))
    source, target = pair.places["p"].agent.sources[100], pair.places["d"].agent.targets[100]
    for _ in range(6):
        pair.turn()
    assert not source.seated
    pair.places["p"].agent.receive(pair.now, "d", late[-1])
    pair.turn()
    assert (target.state, target.offered) == (State.OFFERED, False), (
        "nothing is held while the source holds nothing"
    )
    assert 100 not in pair.places["d"].agent.scheduler.reserved.handoffs
    pair.passes = lambda message: True
    pair.run()
    assert pair.tokens[1] == expected(request, 1, 3) and pair.tokens[2] == expected(older, 1, 3)
    assert pair.restored and not pair.told(Failed)


def test_a_fetch_without_the_ticket_gets_nothing():
    pair = Pair()
    request = Request("r", tuple(ids(23)), Sampling(temperature=0.0), Stopping(max_tokens=1))
    pair.say("p", Prefill(100, "d", request, b"right"))
    for _ in range(4):
        pair.turn()
    place = pair.places["p"]
    for ticket in (b"", b"wrong"):
        place.agent.receive(pair.now, "d", handoff.Fetch(100, 1, 0, 6, ticket))
        assert not [m for _, m in place.turn(pair.now) if isinstance(m, handoff.Parts)]
    place.agent.receive(pair.now, "d", handoff.Fetch(100, 1, 0, 6, b"right"))
    assert [m.num_blocks for _, m in place.turn(pair.now) if isinstance(m, handoff.Parts)] == [6]


def test_waiting_for_room_is_no_reason_to_give_up():
    """A target that holds what is never read has no room for minutes; nobody loses an attempt to it."""
    pair = Pair(num_blocks=12)
    pair.hand(100, 1, ids(30), max_tokens=3)
    while not pair.told(Committed):
        pair.turn()
    pair.say("d", Hold((1,), True))
    pair.hand(101, 2, ids(30, 1), max_tokens=3)
    for _ in range(400):
        pair.turn(1.0)
    assert not pair.told(Failed) and pair.places["d"].agent.targets[101].state is State.OFFERED
    pair.say("d", Hold((1,), False))
    pair.run()
    assert pair.restored and len(pair.told(Over)) == 2


def test_a_source_whose_target_is_silent_lets_go_and_says_so():
    pair = Pair(lambda message: not isinstance(message, handoff.Offer))
    pair.hand(100, 1, ids(30), max_tokens=3)
    for _ in range(40):
        pair.turn(1.0)
    assert [failed.reason for failed in pair.told(Failed)] == ["its lease is over"]
    assert pair.places["p"].restored


def test_what_a_lane_says_that_is_not_a_sides_peer_is_not_taken():
    pair = Pair(lambda message: not isinstance(message, handoff.Fetch))
    pair.hand(100, 1, ids(9), max_tokens=2)
    for _ in range(4):
        pair.turn()
    source, target = pair.places["p"].agent.sources[100], pair.places["d"].agent.targets[100]
    pair.places["p"].agent.receive(pair.now, "x", handoff.Fetch(100, 1, 0, 2))
    pair.places["d"].agent.receive(pair.now, "x", handoff.Gone(100, "no"))
    assert source.state is State.OFFERED and target.state is State.RESERVED


def test_handoffs_get_blocks_in_the_order_they_came():
    """One that needs few must not overtake: its source may wait for blocks that the first one's prompt rests in."""
    pair = Pair(num_blocks=20)
    for number, length in ((100, 45), (101, 45), (102, 25)):
        pair.hand(number, number + 100, ids(length, number), max_tokens=4)
    for _ in range(3):
        pair.turn()
    states = [target.state for target in pair.places["d"].agent.targets.values()]
    assert states == [State.RESERVED, State.OFFERED, State.OFFERED]
    pair.run()
    assert len(pair.told(Over)) == 3 and pair.restored and pair.now < handoff.STALLED_S / 4


def test_lanes_that_fill_each_other_give_up_what_nobody_asked_for():
    """Each pool holds two rested prompts, for a lane that has no room for them."""
    pair = Pair(num_blocks=17)
    lanes = ("p", "d")
    requests = {}
    for k in range(4):
        source, target = lanes[k % 2], lanes[1 - k % 2]
        requests[k] = Request(f"r{k}", tuple(ids(30, k)), Sampling(seed=1), Stopping(max_tokens=3))
        pair.say(source, Prefill(100 + k, target, requests[k]))
    for _ in range(20):
        pair.turn()
    rested = [sum(len(s.blocks) for s in place.agent.scheduler.live.values()) for place in pair.places.values()]
    assert rested == [16, 16], "both pools are full of prompts that wait to be asked for"
    for k, request in requests.items():
        source, target = lanes[k % 2], lanes[1 - k % 2]
        pair.say(target, Expect(100 + k, source, Submit(request, 1, (Part(k + 1),))))
    pair.run()
    assert pair.now < 20.0 and pair.restored, "long before anything stalls"
    assert all(pair.tokens[k + 1] == expected(request, 1, 3) for k, request in requests.items())
