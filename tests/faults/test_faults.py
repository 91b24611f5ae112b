"""Real processes that die, stop and come back: every accepted stream goes on, token for token."""

import random
import time

import pytest

from engine.core.request import Request, Sampling, Stopping
from tests.faults.cluster import Cluster
from tests.faults.worker import VOCAB

SLOTS = {"p0": "prefill", "p1": "prefill", "d0": "decode", "d1": "decode"}


@pytest.fixture(scope="module")
def cluster():
    with Cluster(SLOTS) as made:
        yield made


def some(cluster, count, tag, tokens=60):
    """Requests of every kind, asked at once."""
    rng = random.Random(tag)
    kinds = [{}, {"temperature": 0.0}, {"n": 3}, {"frequency_penalty": 0.5}, {"logprobs": 2}, {"seed": 9}]
    return [
        cluster.ask(
            Request(
                f"{tag}-{k}",
                tuple(rng.choices(range(VOCAB - 1), k=rng.randint(2, 120))),
                Sampling(**kinds[k % len(kinds)]),
                Stopping(max_tokens=rng.randint(1, tokens)),
            )
        )
        for k in range(count)
    ]


def settle(cluster, answers, seconds=30.0, back_s=20.0):
    cluster.wait(lambda: all(answer.ended for answer in answers), seconds)
    assert all(answer.right() for answer in answers)
    cluster.wait(lambda: len(cluster.lanes) == len(SLOTS), back_s)
    took = cluster.wait(lambda: cluster.restored, 5.0)
    cluster.replica.router.check()
    return took


def test_prompts_move_between_processes(cluster):
    settle(cluster, some(cluster, 24, "calm"))
    assert cluster.replica.load()["handoffs_started"] > 0 and cluster.replica.load()["moved_blocks"] > 0


@pytest.mark.parametrize("slot", ["d0", "p0"])
def test_a_killed_process_is_noticed_at_once_and_its_streams_go_on(cluster, slot):
    answers = some(cluster, 24, f"kill {slot}")
    time.sleep(0.1)
    name = cluster.lane(slot)
    cluster.kill(slot)
    assert cluster.wait(lambda: name not in cluster.lanes, 1.0) < 1.0
    cluster.start(slot)
    settle(cluster, answers)


@pytest.mark.parametrize("seconds", [0.5, 5.0])
def test_a_stopped_process_that_goes_on_later_harms_nobody(cluster, seconds):
    for slot in ("d1", "p1"):
        answers = some(cluster, 24, f"stop {slot} {seconds}")
        time.sleep(0.1)
        name = cluster.lane(slot)
        cluster.pause(slot, seconds)
        if seconds > 3.0:
            assert cluster.wait(lambda: name not in cluster.lanes, 4.0) < 3.5  # noqa: B023
        settle(cluster, answers)
        if seconds > 3.0:
            assert cluster.lane(slot) != name, "it came back under its old name"


def test_cancels_at_any_moment_give_every_block_back(cluster):
    rng = random.Random(3)
    for round_ in range(4):
        answers = some(cluster, 16, f"cancel {round_}")
        for answer in answers:
            time.sleep(rng.uniform(0.0, 0.02))
            if rng.random() < 0.7:
                cluster.replica.abort(answer.request.request_id)
        assert settle(cluster, answers) < 5.0
