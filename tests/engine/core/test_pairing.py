"""Two replicas: one computes prompts and holds them, the other claims them; network and fates as the test says.

P  offer --> lane holds --Claim--> (the gateway) --> D  submit(claim) --> lane fetches | computes it itself
"""

import itertools
import random

import pytest

from engine.core import handoff, prefix
from engine.core.handoff import CLAIM_S, LEASE_S, STALLED_S, Fetch, Parts, State
from engine.core.holds import FIRST, Claim, Holds
from engine.core.journeys import Drawn, Ended
from engine.core.messages import FRONT, Meet
from engine.core.request import Request, Sampling, Stopping
from engine.core.router import Router
from engine.errors import SeracError, Unavailable
from tests.engine.core.test_agent import BLOCK, EOS, Place, expected, ids

CONTEXT, STEP_S, COUNT = 64, 0.05, 5


class Replica:
    """A router and its lanes; a lane that dies comes back under a new name."""

    def __init__(self, slots, seed):
        rng, self.lives = random.Random(seed), itertools.count(1)
        self.router = Router(BLOCK, CONTEXT, (EOS,), prefix.root("test"), lambda: rng.randbytes(16))
        self.places = {}
        for slot in slots:
            self.start(slot)

    def start(self, slot):
        name = f"{slot}.{next(self.lives)}"
        self.places[name] = Place(name)
        self.router.lane_up(name, "both")

    def turn(self, now):
        """What its lanes say to those of the other."""
        self.router.tick(now)
        outbox, self.router.outbox = self.router.outbox, []
        for name, message in outbox:
            if name in self.places:
                self.places[name].agent.receive(now, FRONT, message)
        said = []
        for name, place in self.places.items():
            for peer, message in place.turn(now):
                if peer == FRONT:
                    self.router.receive(name, message)
                else:
                    assert peer, "said to nobody"
                    said.append((name, peer, message))
        self.router.check()
        return said

    def die(self, name):
        del self.places[name]
        self.router.lane_lost(name)
        self.start(name.partition(".")[0])


class Two:
    """Both replicas. `fate(message)`: after how many turns a message between lanes arrives, each time it does."""

    def __init__(self, fate=lambda message: (1,), decode=("d0",)):
        self.p, self.d = Replica(("p0",), 1), Replica(decode, 2)
        self.fate, self.now, self.turns = fate, 0.0, 0
        self.mail = []
        self.journeys, self.tokens, self.ended = {}, {}, {}

    def offer(self, prompt, deadline_at=None):
        """What a prefill replica answers: a claim, or an error."""
        number = self.p.router.offer(Request(f"p{self.turns}", tuple(prompt), deadline_at=deadline_at), self.now)
        told = self.p.router.holds.told
        for _ in range(400):
            self.turn()
            if found := [answer for each, answer in told if each == number]:
                return found[0]
        raise AssertionError("the prompt is neither held nor refused")

    def ask(self, name, prompt, claim):
        request = Request(name, tuple(prompt), Sampling(seed=1), Stopping(max_tokens=COUNT, ignore_eos=True))
        self.journeys[name] = self.d.router.submit(request, 1, self.now, claim)
        return request

    def turn(self, step_s=STEP_S):
        self.turns += 1
        self.now += step_s
        due = [mail for mail in self.mail if mail[0] <= self.turns]
        self.mail = [mail for mail in self.mail if mail[0] > self.turns]
        every = self.p.places | self.d.places
        for _, sender, receiver, message in due:
            if receiver in every:
                every[receiver].agent.receive(self.now, sender, message)
        for replica in (self.p, self.d):
            for name, peer, message in replica.turn(self.now):
                self.mail += [(self.turns + after, name, peer, message) for after in self.fate(message)]
        events, self.d.router.events = self.d.router.events, []
        for event in events:
            self.hear(event)

    def hear(self, event):
        if isinstance(event, Drawn):
            for k, track in event.entries:
                self.tokens.setdefault(track.journey.request.request_id, []).append(event.emission.tokens[k])
        elif isinstance(event, Ended):
            name = event.track.journey.request.request_id
            assert name not in self.ended, "a second terminal"
            self.ended[name] = event.reason

    def pass_(self, seconds):
        for _ in range(int(seconds / STEP_S)):
            self.turn()

    def finish(self, within_s=LEASE_S + 2 * STALLED_S):
        """Until nothing is open anywhere, then every block is back."""
        until, long = self.now + within_s, self.now + 5.0
        while self.now < until:
            self.turn(STEP_S if self.now < long else 10 * STEP_S)
            places = [*self.p.places.values(), *self.d.places.values()]
            if not self.mail and not self.d.router.journeys and all(place.agent.idle for place in places):
                assert all(place.restored for place in places)
                assert not self.p.router._legs and not self.d.router._legs and not self.p.router.holds._open
                return self
        raise AssertionError("something is open that nothing ends")

    def check(self, name, request):
        assert self.tokens[name] == expected(request, 1, COUNT) and self.ended[name] == "length"

    @property
    def moved(self):
        return sum(place.agent.moved_blocks for place in self.d.places.values())


@pytest.mark.parametrize("length", [2, 4, 5, 9, 23, 33])
def test_what_one_replica_holds_another_decodes_token_for_token(length):
    two, prompt = Two(), ids(length)
    claim = two.offer(prompt)
    assert isinstance(claim, Claim) and claim.lane == "p0.1" and claim.handoff >= FIRST
    request = two.ask("r", prompt, claim)
    assert two.d.router.outbox[0] == ("d0.1", Meet("p0.1", (), 1, foreign=True))
    two.finish(within_s=5.0).check("r", request)
    assert two.moved == -(-(length - 1) // BLOCK) and two.d.router.recoveries == 0


def test_a_claim_is_good_once_and_who_comes_second_computes_for_himself():
    two, prompt = Two(decode=("d0", "d1")), ids(23)
    claim = two.offer(prompt)
    first = two.ask("a", prompt, claim)
    two.pass_(0.3)
    second = two.ask("b", prompt, claim)
    two.finish().check("a", first)
    two.check("b", second)
    assert two.moved == 6


def test_two_replicas_with_one_claim_get_the_blocks_once():
    two, prompt = Two(), ids(23)
    claim = two.offer(prompt)
    source = two.p.places["p0.1"].agent
    stranger = Fetch(claim.handoff, 1, 0, 2, claim.ticket)
    source.receive(two.now, "y0.1", stranger)
    source.receive(two.now, "d0.1", stranger)
    assert source.sources[claim.handoff].target == "y0.1"
    assert source.outbox[-1] == ("d0.1", handoff.Gone(claim.handoff, "it is over"))
    request = two.ask("r", prompt, claim)
    two.finish().check("r", request)
    assert two.moved == 0 and two.d.router.recoveries == 1


def test_a_wrong_ticket_gets_nothing_and_leaves_the_right_one_good():
    two, prompt = Two(), ids(23)
    claim = two.offer(prompt)
    request = two.ask("bad", prompt, claim._replace(ticket=b"x" * 16))
    two.pass_(1.0)
    two.check("bad", request)
    assert two.moved == 0 and two.d.router.recoveries == 1
    two.d.places["d0.1"].agent.scheduler.pool.forget_all()
    request = two.ask("good", prompt, claim)
    two.finish().check("good", request)
    assert two.moved == 6


def test_a_lease_ends_by_itself_and_a_late_claim_computes_for_itself():
    two, prompt = Two(), ids(23)
    claim = two.offer(prompt)
    two.pass_(LEASE_S - 1.0)
    assert not two.p.places["p0.1"].restored
    two.pass_(2.0)
    assert two.p.places["p0.1"].restored
    request = two.ask("r", prompt, claim)
    two.pass_(2.0)
    two.check("r", request)
    assert two.moved == 0
    two.finish()


def test_a_long_prompt_has_its_whole_lease_after_it_is_computed():
    two, prompt = Two(), ids(50)
    number = two.p.router.offer(Request("p", tuple(prompt)), 0.0)
    two.turn()
    two.now += LEASE_S - 0.3  # its other chunks come late
    while not two.p.router.holds.told:
        two.turn()
    assert two.p.router.holds.told[0][0] == number and isinstance(two.p.router.holds.told[0][1], Claim)
    two.pass_(LEASE_S - 1.0)
    assert not two.p.places["p0.1"].restored


def test_a_holder_that_is_gone_costs_a_claim_a_few_seconds_and_its_blocks_a_minute():
    two, prompt = Two(), ids(23)
    claim = two.offer(prompt)
    two.p.die("p0.1")
    began = two.now
    request = two.ask("r", prompt, claim)
    while "r" not in two.ended:
        two.turn()
        assert two.now - began < CLAIM_S + 3.0
    two.check("r", request)
    assert two.d.places["d0.1"].agent.scheduler.pool.writing == 6, "nobody knows whether something is on its way"
    two.finish()
    assert two.now - began > STALLED_S


def test_a_holder_that_dies_while_it_sends_costs_no_token():
    two = Two(fate=lambda message: () if isinstance(message, Parts) and message.first >= 4 else (1,))
    prompt = ids(40)
    two.p.places["p0.1"].agent._part_blocks = 2
    claim = two.offer(prompt)
    request = two.ask("r", prompt, claim)
    two.pass_(0.5)
    two.p.die("p0.1")
    two.finish().check("r", request)


def test_a_decode_lane_that_dies_with_a_claim_leaves_a_lease_that_ends():
    two, prompt = Two(decode=("d0", "d1")), ids(40)
    two.p.places["p0.1"].agent._part_blocks = 1
    claim = two.offer(prompt)
    request = two.ask("r", prompt, claim)
    two.pass_(0.15)
    target = next(name for name, place in two.d.places.items() if place.agent.targets)
    two.d.die(target)
    two.pass_(2.0)
    two.check("r", request)
    assert not two.p.places["p0.1"].restored
    two.finish()


def test_who_stops_waiting_before_the_prompt_is_held_leaves_nothing():
    two = Two()
    number = two.p.router.offer(Request("p", tuple(ids(50))), 0.0)
    two.turn()
    two.p.router.holds.close(number)
    two.p.router.holds.close(number)
    two.pass_(1.0)
    assert two.p.places["p0.1"].restored and not two.p.router.holds.told


def test_a_lane_that_dies_while_it_computes_is_an_error_to_try_again():
    two = Two()
    two.p.router.offer(Request("p", tuple(ids(50))), 0.0)
    two.turn()
    two.p.die("p0.1")
    ((_, error),) = two.p.router.holds.told
    assert isinstance(error, Unavailable)
    empty = Holds({}, lambda name, message: None, lambda: b"")
    with pytest.raises(Unavailable, match="no lane is ready"):
        empty.open(Request("p", (1, 2)), 1, 0.0, 1.0)


def test_a_device_failure_at_the_holder_is_computed_again_and_held():
    two, prompt = Two(), ids(23)
    claim = two.offer(prompt)
    place = two.p.places["p0.1"]
    place.device.reset()
    place.agent.fail(None, "gone")
    two.pass_(0.5)
    request = two.ask("r", prompt, claim)
    two.finish().check("r", request)
    assert two.moved == 6


def test_a_device_failure_while_a_claim_is_in_quarantine_forgets_its_blocks():
    two, prompt = Two(), ids(23)
    claim = two.offer(prompt)
    two.p.die("p0.1")
    request = two.ask("r", prompt, claim)
    two.pass_(CLAIM_S + 2.0)
    place = two.d.places["d0.1"]
    assert place.agent.scheduler.pool.writing == 6
    place.device.reset()
    place.agent.fail(None, "gone")
    assert place.agent.scheduler.pool.writing == 0
    two.finish().check("r", request)


def test_blocks_that_others_took_end_a_claim():
    ticket = b"t" * 16
    source = handoff.Source(FIRST, "", 2, ticket=ticket)
    target = handoff.Target(FIRST, "p", 2, ticket=ticket, offered=True, claims=True)
    assert source.computed(0.0, 2) == [], "there is nobody to offer it to"
    source.unseated()
    (fetch,) = target.reserved(0.0, 0)
    assert source.admits("d", fetch) and not source.admits("e", fetch)
    (withdrawn,) = source.receive(0.0, fetch)
    _, (stop,) = target.receive(0.0, withdrawn)
    assert target.state is State.ABORTED and stop == handoff.Stop(FIRST)
    source.receive(0.0, stop)
    assert source.state is State.ABORTED


def test_the_deadline_of_who_offers_is_not_that_of_who_claims():
    two, prompt = Two(), ids(23)
    claim = two.offer(prompt, deadline_at=1.0)
    two.pass_(3.0)
    request = two.ask("r", prompt, claim)
    two.finish().check("r", request)
    assert two.moved == 6


class Fates:
    """What befalls both, by a seed, until all is `calm`."""

    def __init__(self, seed):
        self.rng, self.calm, self.parts = random.Random(seed), False, 0
        self.two, self.asked = Two(self.fate, decode=("d0", "d1")), {}

    def fate(self, message):
        self.parts += isinstance(message, Parts)
        luck = 1.0 if self.calm else self.rng.random()
        times = 0 if luck < 0.1 else 2 if luck < 0.2 else 1
        return [1 + (self.rng.randrange(100) if self.rng.random() < 0.1 else 0) for _ in range(times)]

    def ask(self, name):
        two, rng, prompt = self.two, self.rng, ids(self.rng.randint(2, 50), seed=self.rng.randrange(4))
        claim = two.offer(prompt)
        if isinstance(claim, SeracError):
            return
        if rng.random() < 0.15:
            two.pass_(rng.choice([1.0, LEASE_S - 1.0, LEASE_S + 1.0]))
        if rng.random() < 0.1:
            claim = claim._replace(ticket=rng.randbytes(16))
        for copy in range(1 + (rng.random() < 0.2)):
            self.asked[f"{name}.{copy}"] = two.ask(f"{name}.{copy}", prompt, claim)
            two.pass_(rng.choice([0.0, 0.1, 0.3]))

    def strike(self):
        two, luck = self.two, self.rng.random()
        if luck < 0.15:
            two.p.die(next(iter(two.p.places)))
        elif luck < 0.3:
            two.d.die(self.rng.choice(list(two.d.places)))
        elif luck < 0.4 and self.asked and (name := self.rng.choice(list(self.asked))) not in two.ended:
            two.d.router.cancel(two.journeys[name])


def test_whatever_befalls_them_answers_are_right_and_no_block_is_lost():
    parts = asked = 0
    for seed in range(25):
        fates = Fates(seed)
        for k in range(10):
            fates.ask(k)
            fates.strike()
        fates.calm = True
        fates.two.finish()
        for name, request in fates.asked.items():
            if fates.two.ended[name] != "abort":
                fates.two.check(name, request)
        parts, asked = parts + fates.parts, asked + len(fates.asked)
    assert asked > 200 and parts > asked / 2, "most claims are honoured"
