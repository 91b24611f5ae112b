"""The simulator's gate: lives without a violation, the same life twice, and no bug on purpose that stays unseen."""

import pytest

from engine.sim.world import World
from tests.sim.__main__ import hunt, spread
from tests.sim.handoffs import Walk
from tests.sim.mutants import ROWS, Mutant, changed, load, path_of


def test_a_life_is_the_same_twice():
    one, other = World(7).run(), World(7).run()
    assert one.digest == other.digest and one.events == other.events > 200
    assert one.digest != World(8).run().digest


def test_without_faults_every_answer_is_whole():
    for seed in range(10):
        world = World(seed, calm=True).run()
        assert set(world.judge.ended.values()) <= {"length", "stop"} and world.router.recoveries == 0


def test_a_long_life_of_many_requests_keeps_every_promise():
    world = World(16, requests=200).run()  # two decode lanes, cuts, a restart, a third of all cancelled
    assert len(world.judge.ended) >= 200 and world.router.handoffs > 30 and world.router.recoveries > 10


def test_no_block_of_many_handoffs_holds_what_is_not_its_own():
    counts = Walk(1, 10_000).run()
    assert counts["foreign blocks"] == counts["lost blocks"] == 0
    assert counts["committed"] + counts["aborted"] + counts["died"] == 10_000
    assert min(counts["committed"], 10 * counts["aborted"], 10 * counts["cancels"]) > 5_000


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("(part.generation, part.first) != wanted", "part.generation != self.generation"),
        ("        if self.have == self.total:\n", "        if self.have >= self.total - 1:\n"),
        ("min(self.ready, self.allowed,", "min(self.allowed,"),
    ],
)
def test_a_walk_of_machines_with_a_bug_meets_foreign_blocks(before, after):
    walk = Walk(1, 2_000, load(Mutant("", "engine.core.handoff", before, after)))
    assert walk.run()["foreign blocks"] > 0


def test_a_thousand_lives_keep_every_promise():
    assert spread(0, 1000, 2) == 0


@pytest.mark.parametrize("row", ROWS, ids=[row.name.replace(" ", "-") for row in ROWS])
def test_a_mutant_is_a_change_of_what_stands_there(row):
    assert compile(changed(row), row.module, "exec") != compile(path_of(row).read_text(), row.module, "exec")


def test_every_mutant_is_found():
    assert hunt("all", 1000, 2) == 0
