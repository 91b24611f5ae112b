"""The simulator's gate: lives without a violation, the same life twice, and no bug on purpose that stays unseen."""

import pytest

from engine.sim.world import World
from tests.sim.__main__ import hunt, spread
from tests.sim.mutants import ROWS, changed, path_of


def test_a_life_is_the_same_twice():
    one, other = World(7).run(), World(7).run()
    assert one.digest == other.digest and one.events == other.events > 200
    assert one.digest != World(8).run().digest


def test_without_faults_every_answer_is_whole():
    for seed in range(10):
        world = World(seed, calm=True).run()
        assert set(world.judge.ended.values()) <= {"length", "stop"} and world.router.recoveries == 0


def test_a_thousand_lives_keep_every_promise():
    assert spread(0, 1000, 2) == 0


@pytest.mark.parametrize("row", ROWS, ids=[row.name.replace(" ", "-") for row in ROWS])
def test_a_mutant_is_a_change_of_what_stands_there(row):
    assert compile(changed(row), row.module, "exec") != compile(path_of(row).read_text(), row.module, "exec")


def test_every_mutant_is_found():
    assert hunt("all", 1000, 2) == 0
