"""Who is told which blocks are published, over pools that fill, forget, evict and go."""

import random

import numpy as np
import pytest

from engine.core import prefix
from engine.core.agent import Agent
from engine.core.blocks import BlockPool, Content
from engine.core.directory import Directory
from engine.core.messages import FRONT, Blocks, Prefixes
from engine.core.request import Request, Stopping
from engine.core.router import Router
from engine.core.scheduler import LaneShape, Scheduler
from engine.core.sequence import Part
from engine.sim.runner import ModelledRunner

START = prefix.start(b"", "", b"")


def chain(*numbers: int, start: bytes = START) -> list[Content]:
    """Blocks of two tokens, one for each number."""
    return prefix.extend(start, (), np.repeat(np.array(numbers, np.int32), 2), 2)


def replayed(known: list[Content], news) -> dict[bytes, Content]:
    """What a reader holds that applies all it hears; each block must be new, or known, when it is said to be."""
    held = {content.key: content for content in known}
    for key, content in news:
        if content is None:
            del held[key]
        else:
            assert key not in held
            held[key] = content
    return held


class Walk:
    """Lanes with pools that fill, forget and evict, are said anew as a whole, and go."""

    def __init__(self, seed: int):
        self.rng, self.directory = random.Random(seed), Directory(START)
        self.pools: dict[str, BlockPool] = {}
        self.chains = [chain(*(self.rng.randrange(3) for _ in range(4))) for _ in range(6)]
        self.chains += [chain(1, 2, start=prefix.start(b"", "", b"salt"))]

    @property
    def truth(self) -> dict[bytes, Content]:
        return {c.key: c for pool in self.pools.values() for c in pool.published if c.start == START}

    def step(self):
        name, move = f"lane {self.rng.randrange(3)}", self.rng.random()
        pool = self.pools.setdefault(name, BlockPool(7))
        if pool.news is None:
            self._say_whole(name)
        if move < 0.7:
            self._fill(pool)
        elif move < 0.75:
            pool.forget_all()
        elif move < 0.8:
            del self.pools[name]
            self.directory.lost(name)
            return
        elif move < 0.9:
            self._say_whole(name)
        changes, pool.news = pool.news, []
        self.directory.receive(name, Blocks(False, tuple(changes)))

    def _say_whole(self, name: str):
        pool = self.pools[name]
        pool.news = []
        self.directory.receive(name, Blocks(True, tuple((each.key, each) for each in pool.published)))

    def _fill(self, pool: BlockPool):
        contents = self.rng.choice(self.chains)
        blocks = pool.share(contents)
        if len(contents) - len(blocks) <= pool.available:
            blocks += pool.take(len(contents) - len(blocks))
            for block, content in zip(blocks, contents, strict=True):
                pool.publish(block, content)
        pool.drop(blocks)


@pytest.mark.parametrize("seed", range(20))
def test_a_reader_knows_what_some_lane_holds_however_lanes_fill_forget_and_go(seed):
    walk, readers = Walk(seed), []
    for turn in range(300):
        if turn % 50 == 0:
            readers.append((*walk.directory.open(lambda: None), []))
        walk.step()
        for reader, known, heard in readers:
            heard += reader.take()
            assert replayed(known, heard) == walk.truth
        walk.directory.check()
    for _, known, _ in readers:
        for k, content in enumerate(known):
            assert content.parent not in {later.key for later in known[k:]}, "a block stands before its parent"


def test_a_block_that_comes_back_stands_before_those_that_follow_it():
    directory, (a, b, c) = Directory(START), chain(1, 2, 3)
    directory.open(lambda: None)
    news = [(each.key, each) for each in (a, b, c)]
    directory.receive("b0", Blocks(False, (*news, (a.key, None), (b.key, None), news[1], news[0])))
    assert directory.open(lambda: None)[1] == [a, b, c]


def test_a_pool_tells_nothing_unless_asked():
    pool, (a,) = BlockPool(3), chain(1)
    pool.publish(pool.take(1)[0], a)
    assert pool.news is None
    pool.news = []
    pool.forget_all()
    assert pool.news == [(a.key, None)] and pool.published == []


def agent() -> Agent:
    return Agent("b0", Scheduler(LaneShape(9, 16, 2, 32, 64, 100), b""))


def served(lane: Agent, prompt: int) -> list:
    """Serve a prompt of 40 tokens, and what was said of blocks meanwhile."""
    runner = ModelledRunner(9, 16, 2, 64, 100)
    request = Request(f"r{prompt}", tuple([prompt] * 40), stopping=Stopping(max_tokens=1))
    lane.scheduler.submit(request, 0, (Part(prompt),))
    while not lane.idle:
        if (plan := lane.plan(0.0)) is not None:
            runner.launch(plan)
            lane.collect(runner.collect())
    return told(lane)


def told(lane: Agent) -> list[Blocks]:
    said, lane.outbox = lane.outbox, []
    return [message for peer, message in said if peer == FRONT and isinstance(message, Blocks)]


def test_a_lane_that_is_asked_tells_all_it_has_then_what_changes():
    lane = agent()
    assert served(lane, 1) == []
    lane.receive(0.0, FRONT, Prefixes(True, False))
    (first,) = told(lane)
    assert first.whole and len(first.news) == 2
    assert [message.whole for message in served(lane, 2)] == [False]
    lane.receive(0.0, FRONT, Prefixes(True, True))
    assert told(lane) == [Blocks(True, ())] and not lane.scheduler.pool.published
    lane.receive(0.0, FRONT, Prefixes(False, False))
    assert served(lane, 3) == [] and told(lane) == []


def test_a_lane_whose_device_failed_says_that_nothing_is_left():
    lane = agent()
    lane.receive(0.0, FRONT, Prefixes(True, False))
    served(lane, 1)
    lane.fail(None, "gone")
    assert told(lane) == [Blocks(True, ())]
    (late,) = served(lane, 2)
    assert not late.whole and late.news


def test_the_lanes_of_a_router_tell_only_while_somebody_reads():
    router = Router(2, 64)
    router.lane_up("b0", "both")
    assert router.outbox == []
    first, _ = router.read_blocks(lambda: None)
    second, _ = router.read_blocks(lambda: None)
    router.lane_up("b1", "both")
    assert router.outbox == [("b0", Prefixes(True, False)), ("b1", Prefixes(True, False))]
    router.receive("b0", Blocks(True, tuple((each.key, each) for each in chain(1, 2))))
    router.receive("gone", Blocks(True, tuple((each.key, each) for each in chain(3))))
    assert len(first.take()) == 2
    router.lane_lost("b0")
    assert [content for _, content in first.take()] == [None, None] and second.waiting == 4
    router.receive("b1", Blocks(True, tuple((each.key, each) for each in chain(5))))
    router.outbox = []
    router.close_blocks(first)
    router.forget_blocks()
    assert router.outbox == [("b1", Prefixes(True, True))]
    router.outbox = []
    router.close_blocks(second)
    router.forget_blocks()
    assert router.outbox == [("b1", Prefixes(False, False)), ("b1", Prefixes(False, True))]
    router.receive("b1", Blocks(False, tuple((each.key, each) for each in chain(4))))
    assert router.read_blocks(lambda: None)[1] == []
