"""Parts between lanes of one process: in order, whole, or without their bytes."""

import queue
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

from engine.core.handoff import Parts
from engine.errors import DeviceError
from engine.movers.courier import LocalCourier
from engine.movers.local import HEADS
from engine.runner.moves import Staged
from sharding.mesh import MeshSpec, lane_meshes

COUNT = 3


def staged(seed=0):
    (mesh,) = lane_meshes(MeshSpec(tp=2), 4, 4, jax.devices())
    rng = np.random.default_rng(seed)
    arrays = [rng.standard_normal((4, 2, COUNT + 1, 4, 8), np.float32) for _ in range(2)]
    return Staged(*jax.device_put(arrays, NamedSharding(mesh, HEADS)))


def part(number, content=None):
    return Parts(number, 1, 0, COUNT, staged(number) if content is None else content)


def spoiled(moved, block):
    """The same with one value of one block changed."""
    values = np.array(moved.values_KLnCH)
    values[0, 0, block, 0, 0] += 1.0
    return moved._replace(values_KLnCH=jax.device_put(values, moved.values_KLnCH.sharding))


def carrier(carry=lambda moved: moved, shared=False):
    return SimpleNamespace(carry=carry, shared=shared)


@pytest.fixture
def courier():
    """courier(carry) -> (send, what is delivered)."""
    made = []

    def make(carry, shared=False, verify=True):
        delivered = queue.Queue()
        ways = {("p0", "d1"): carrier(carry, shared), ("d1", "p0"): carrier(carry, shared)}
        made.append(LocalCourier(ways, lambda *words: delivered.put(words), verify))
        return made[-1], delivered

    yield make
    for each in made:
        each.stop()


def test_parts_come_in_the_order_they_were_sent(courier):
    made, delivered = courier(lambda moved: moved)
    parts = [part(number) for number in range(5)]
    for each in parts:
        made.send("p0", "d1", each)
    for each in parts:
        receiver, sender, came = delivered.get(timeout=20)
        assert (receiver, sender, came) == ("d1", "p0", each)


def test_a_damaged_part_comes_without_its_bytes(courier):
    made, delivered = courier(lambda moved: spoiled(moved, COUNT - 1))
    made.send("p0", "d1", part(0))
    assert delivered.get(timeout=20)[2] == part(0)._replace(staged=None)


def test_what_stands_behind_the_blocks_is_not_compared(courier):
    made, delivered = courier(lambda moved: spoiled(moved, COUNT))
    made.send("p0", "d1", part(0))
    assert delivered.get(timeout=20)[2].staged is not None


@pytest.mark.parametrize("error", [DeviceError("device: lost"), RuntimeError("lost")])
def test_a_device_error_loses_the_bytes_and_nothing_after_them(courier, error):
    failing = [error]

    def carry(moved):
        if failing:
            raise failing.pop()
        return moved

    made, delivered = courier(carry)
    made.send("p0", "d1", part(0))
    made.send("d1", "p0", part(1))
    assert delivered.get(timeout=20)[2].staged is None
    receiver, sender, came = delivered.get(timeout=20)
    assert (receiver, sender) == ("p0", "d1") and came.staged is not None


@pytest.mark.parametrize(("shared", "verify"), [(True, True), (False, False)])
def test_nothing_is_compared_where_memory_is_shared_or_nobody_asked(courier, shared, verify):
    made, delivered = courier(lambda moved: spoiled(moved, 0), shared, verify)
    made.send("p0", "d1", part(0))
    assert delivered.get(timeout=20)[2].staged is not None


def test_stop_brings_what_is_queued(courier):
    made, delivered = courier(lambda moved: moved)
    for number in range(4):
        made.send("p0", "d1", part(number))
    made.stop()
    assert delivered.qsize() == 4
