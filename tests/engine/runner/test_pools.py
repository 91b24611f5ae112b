"""Prefill and decode lanes of unequal meshes, real runners, blocks carried between them: as one lane alone.

CI runs a few pairs; `SERAC_PAIRS=all` runs every one of tp 1, 2, 4, 8, and two prefill with two decode lanes.
"""

import os

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from engine.clock import SystemClock
from engine.core import prefix
from engine.core.agent import Agent
from engine.core.journeys import Drawn, Ended
from engine.core.request import Request, Sampling, Stopping
from engine.core.router import Router
from engine.core.scheduler import LaneShape, Scheduler
from engine.movers.courier import LocalCourier
from engine.movers.local import Carrier
from engine.observe.metrics import Metrics
from engine.replica.lane import Lane
from engine.runner.buckets import Bucket
from engine.runner.compiles import CompileCounter
from sharding.overlap import overlaps

VOCAB, KV_HEADS, BLOCK, CONTEXT, MOVES = 211, 2, 16, 160, (1, 8)
STEPS = tuple(Bucket(*shape, full) for shape in ((8, 8, True), (64, 8, False)) for full in (False, True))
PAIRS = [("prefill:4", "decode:2"), ("prefill:2", "decode:4"), ("prefill:1", "decode:8")]
MORE = [(f"prefill:{a}", f"decode:{b}") for a in (1, 2, 4, 8) for b in (1, 2, 4, 8) if a + b < 16]
FOUR = ("prefill:2", "prefill:1", "decode:1", "decode:2")
if os.environ.get("SERAC_PAIRS") == "all":
    PAIRS = [*MORE, FOUR]
OPTIONS = ({"temperature": 0.0}, {"temperature": 0.8}, {"top_k": 9, "logprobs": 2}, {"frequency_penalty": 0.3})


class Pools:
    """Lanes in one process, turned by hand; `lanes` as "role:tp"."""

    def __init__(self, make_runner, lanes):
        self.router = Router(BLOCK, CONTEXT, (), prefix.root("tiny"))
        self.lanes, self.tokens, self.logprobs, self.ended = {}, {}, {}, {}
        sizes = [int(lane.split(":")[1]) for lane in lanes]
        firsts = [tp * sizes[:k].count(tp) for k, tp in enumerate(sizes)]  # lanes of one size have devices apart
        runners = {f"{k}": make_runner(tp, choices=STEPS, move_sizes=MOVES, first=first)
                   for k, (tp, first) in enumerate(zip(sizes, firsts, strict=True))}  # fmt: skip
        carriers = self.carriers = {}
        for a, source in runners.items():
            for b, target in runners.items():
                axes = [tuple(r.model.mesh.shape[axis] for axis in ("kv", "rep")) for r in (source, target)]
                carriers[a, b] = Carrier(source.model.mesh, target.model.mesh, overlaps(KV_HEADS, *axes))
        self.courier = LocalCourier(carriers, lambda to, sender, part: self.lanes[to].hear(sender, part), True)
        for name, runner in runners.items():
            runner.reset()
            shape = LaneShape(runner.sizes.num_blocks, BLOCK, 8, 64, CONTEXT, VOCAB)
            agent = Agent(name, Scheduler(shape, prefix.root("tiny")), MOVES[-1])
            self.lanes[name] = Lane(agent, runner, SystemClock(), Metrics(CollectorRegistry()), self.courier)
            self.lanes[name].connect(self._hear)
            self.router.lane_up(name, lanes[int(name)].split(":")[0])

    def warm_up(self):
        """Compile what carrying takes, as a replica does before it is ready."""
        for (a, _), carrier in self.carriers.items():
            source = self.lanes[a]._device
            carrier.warm_up([source.gather([1] * size) for size in MOVES])

    def _hear(self, sender, said):
        for peer, message in said:
            if peer == "front":
                self.router.receive(sender, message)
            else:
                self.lanes[peer].hear(sender, message)

    def submit(self, name, prompt, **options):
        request = Request(name, tuple(prompt), Sampling(**options), Stopping(max_tokens=6))
        return self.router.submit(request, 3, 0.0)

    def run(self, cancel=lambda: None):
        while self.router.journeys:
            cancel()
            outbox, self.router.outbox = self.router.outbox, []
            for name, message in outbox:
                self.lanes[name].hear("front", message)
            for lane in self.lanes.values():
                lane.turn()
            self._take()
        while any(lane.turn() for lane in self.lanes.values()):
            pass
        return self

    def _take(self):
        events, self.router.events = self.router.events, []
        for event in events:
            if isinstance(event, Drawn):
                for k, track in event.entries:
                    key = track.journey.request.request_id, track.choice
                    self.tokens.setdefault(key, []).append(int(event.emission.tokens[k]))
                    if event.emission.logprob is not None:
                        self.logprobs.setdefault(key, []).append(float(event.emission.logprob[k]))
            elif isinstance(event, Ended):
                self.ended[event.track.journey.request.request_id, event.track.choice] = event.reason

    @property
    def restored(self):
        pools = [lane.agent.scheduler.pool for lane in self.lanes.values()]
        return all(pool.available == pool.usable and not pool.writing for pool in pools)


def prompts():
    rng = np.random.default_rng(1)
    shared = rng.integers(0, VOCAB, 48)
    for number, length in enumerate((1, 16, 17, 40, 64, 65, 97, 33)):
        tail = rng.integers(0, VOCAB, length)
        yield number, tuple(map(int, [*shared, *tail] if number % 2 else tail))


def ask(pools):
    for number, prompt in prompts():
        pools.submit(f"{number}", prompt, seed=number, n=1 + number % 2, **OPTIONS[number % len(OPTIONS)])


@pytest.fixture(scope="module")
def whole(make_runner):
    """What one lane on one device draws."""
    pools = Pools(make_runner, ["both:1"])
    ask(pools)
    return pools.run()


@pytest.mark.parametrize("lanes", PAIRS, ids=["-".join(lanes).replace(":", "") for lanes in PAIRS])
def test_any_two_pools_draw_what_one_lane_draws(make_runner, whole, lanes):
    pools = Pools(make_runner, lanes)
    for again in range(2):  # the second time much is cached
        pools.tokens.clear(), pools.logprobs.clear()
        ask(pools)
        pools.run()
        assert pools.tokens == whole.tokens, f"tokens, time {again}"
        scored = {key for key in whole.logprobs if int(key[0]) % len(OPTIONS) == 2}
        assert {key: pools.logprobs[key] for key in scored} == {key: whole.logprobs[key] for key in scored}
    assert pools.router.handoffs >= 5 and pools.restored and pools.router.recoveries == 0
    moved = sum(lane.agent.moved_blocks for lane in pools.lanes.values())
    assert moved > 0 and set(pools.ended.values()) == {"length"}


def test_a_storm_of_cancels_leaves_the_others_as_they_were(make_runner, whole):
    pools = Pools(make_runner, PAIRS[0])
    ask(pools)
    rng, doomed = np.random.default_rng(2), []
    for k in range(20):
        prompt = map(int, rng.integers(0, VOCAB, rng.integers(2, 120)))
        doomed.append(pools.submit(f"doomed {k}", prompt, seed=k))

    def cancel():
        if doomed and rng.random() < 0.4:
            pools.router.cancel(doomed.pop(rng.integers(len(doomed))))

    pools.run(cancel)
    assert {key: tokens for key, tokens in pools.tokens.items() if "doomed" not in key[0]} == whole.tokens
    assert pools.restored


def test_nothing_is_compiled_while_blocks_move(make_runner):
    pools = Pools(make_runner, PAIRS[0])
    pools.warm_up()
    counter = CompileCounter()
    counter.seal()
    ask(pools)
    assert pools.run().router.handoffs > 0 and counter.late == 0
