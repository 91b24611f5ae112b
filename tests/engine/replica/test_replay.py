"""A lane around a hash device with a log around that, and the log run again on another hash device."""

import os
import random
from dataclasses import replace

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from engine.clock import ManualClock
from engine.core import prefix
from engine.core.agent import Agent
from engine.core.events import Emission
from engine.core.plan import TOP, StepPlan, StepResult
from engine.core.request import Request, Sampling, Stopping
from engine.core.scheduler import LaneShape, Scheduler
from engine.errors import Malformed
from engine.observe.metrics import Metrics
from engine.observe.plan_log import FRAME, Failure, Header, PlanLog
from engine.observe.plan_writer import PlanWriter, open_log
from engine.replica.lane import Lane
from engine.replica.recorded import Recorded
from engine.replica.replay import Replay, differing
from engine.sim.runner import ModelledRunner, alone

FULL = ("logprob", "rank", "top_ids", "top_logprobs")
BLOCKS, BLOCK, ROWS, LENGTH, TOKENS, VOCAB = 60, 4, 6, 64, 16, 997
WHAT = {"lane": "0", "model": "hash", "revision": "r1", "dtype": "float32", "numerics": "invariant", "mesh": "tp=1"}
SIZES = {"num_blocks": BLOCKS, "block_size": BLOCK, "max_rows": ROWS, "max_length": LENGTH, "max_tokens": TOKENS}
HEADER = Header(**WHAT, **SIZES, kv_dtype="auto", vocab=VOCAB, device="none", serac="0", jax="0", jaxlib="0")


def hash_device() -> ModelledRunner:
    return ModelledRunner(BLOCKS, BLOCK, ROWS, LENGTH, VOCAB)


class Life:
    """A lane that logs, and what it was asked for."""

    def __init__(self, log: PlanWriter, seed: int = 0):
        self.log, self.rng, self.device = log, random.Random(seed), hash_device()
        self.scheduler = Scheduler(LaneShape(BLOCKS, BLOCK, ROWS, TOKENS, LENGTH, VOCAB), prefix.root("t"))
        self.tokens: dict[int, list[int]] = {}
        self.sequences = []
        metrics = Metrics(CollectorRegistry())
        agent = Agent("0", self.scheduler)
        self.lane = Lane(agent, Recorded(self.device, log), ManualClock(), metrics)
        self.lane.connect(self._take)

    def _take(self, name, said):
        for _, event in said:
            if isinstance(event, Emission):
                for serial, token in zip(event.serials.tolist(), event.tokens.tolist(), strict=True):
                    self.tokens.setdefault(serial, []).append(token)

    def submit(self, **options):
        prompt = self.rng.choices(range(VOCAB), k=self.rng.randint(1, 30))
        sampling = {"temperature": 0.7, "seed": self.rng.randrange(2**60), **options}
        request = Request(f"{len(self.sequences)}", tuple(prompt), Sampling(**sampling), Stopping(max_tokens=12))
        self.sequences += self.scheduler.submit(request, 0)

    def run(self):
        while self.lane.turn():
            self.scheduler.check()
        return self

    def some(self):
        """Requests of every kind of plan."""
        for options in ({}, {"temperature": 0.0}, {"n": 2, "logprobs": 2}, {"prompt_logprobs": 1}):
            self.submit(**options)
        return self.run()

    def right(self):
        """Every sequence drew what it draws alone."""
        return all(
            self.tokens[s.serial] == alone(list(s.request.prompt_ids), s.draw, 12, VOCAB) for s in self.sequences
        )


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "plans"


@pytest.fixture
def life(folder):
    """`life(seed)`: a lane whose log is in `folder`."""
    return lambda seed=0: Life(open_log(folder, HEADER, 1 << 30), seed)


def again(folder, device=None) -> Replay:
    """The newest log in `folder`, ready to run."""
    return Replay(PlanLog(max(folder.iterdir())), device or hash_device(), 0.0, ManualClock())


def test_a_log_replays_equal(life, folder):
    first = life().some()
    first.log.close()
    outcome = again(folder).run()
    assert outcome.equal and outcome.first is None and first.right()
    assert outcome.steps == first.lane.agent.steps > 10 and outcome.points >= 12 * 5 + 1
    assert outcome.rows >= outcome.points - 30 and (outcome.resets, outcome.failures, outcome.unanswered) == (
        0,
        0,
        0,
    )


def changed(path, number, change):
    """Make record `number`, a result, another one, with the right checksums."""
    log = PlanLog(path)
    records = list(log.records())
    writer = open_log(path.parent, log.header, 1 << 30)
    for k, record in enumerate(records):
        if k == number:
            record = change(record)
        writer.plan(record) if isinstance(record, StepPlan) else writer.result(record)
    writer.close()


@pytest.mark.parametrize("name", ["tokens", "finite", "logprob", "rank", "top_ids", "top_logprobs"])
def test_a_changed_result_is_found_at_its_step_and_point(life, folder, name):
    life().some().log.close()
    path = max(folder.iterdir())
    records = list(PlanLog(path).records())
    full = [
        k for k, r in enumerate(records) if isinstance(r, StepResult) and r.rank is not None and len(r.rank) > 1
    ]
    number = full[len(full) // 2]

    def change(result):
        array = np.array(getattr(result, name))
        array[1] = ~array[1] if name == "finite" else array[1] + 1
        return replace(result, **{name: array})

    changed(path, number, change)
    outcome = again(folder).run()
    assert not outcome.equal and outcome.different == 1
    first = outcome.first
    what = name + "[0]" if name.startswith("top") else name
    assert (first.step, first.point, first.what) == (records[number].step, 1, what)
    assert first.wanted != first.got == getattr(records[number], name)[1].flat[0]


def test_a_device_that_loses_a_block_is_found(life, folder):
    """Here the replay goes wrong instead of the log."""
    life().some().log.close()
    device = hash_device()
    launch, count = device.launch, []

    def losing(plan):
        count.append(plan)
        if len(count) == 5:
            device.kv[1:20] = 3
        launch(plan)

    device.launch = losing
    outcome = again(folder, device).run()
    assert outcome.different > 1 and outcome.first.step == count[4].step


@pytest.mark.parametrize("seed", range(6))
def test_failures_of_the_device_are_replayed_around(life, folder, seed):
    lived = life(seed)
    lived.device.fail_launch |= {2, 5}
    lived.device.fail_collect |= {4, 20}
    for turn in range(40):
        if turn % 5 == 0:
            lived.submit()
        lived.lane.turn()
    lived.run().log.close()
    outcome = again(folder).run()
    failures = [r for r in PlanLog(max(folder.iterdir())).records() if isinstance(r, Failure)]
    assert [f.step for f in failures if f.at == "launch"] == [2, 5]
    assert [f.step for f in failures if f.at == "collect"] == [4, 20]
    assert lived.right() and not lived.device.fail_collect
    assert outcome.equal and (outcome.resets, outcome.failures) == (2, 4)


def test_steps_in_flight_when_the_log_ends_are_run_and_not_compared(life, folder):
    lived = life()
    lived.submit()
    for _ in range(8):
        lived.lane.turn()
    assert len(lived.scheduler.flights) == 2
    lived.log.close()
    outcome = again(folder).run()
    assert outcome.equal and outcome.unanswered == 2 and outcome.steps == lived.lane.agent.steps


def test_a_log_that_was_cut_is_replayed_up_to_there(life, folder):
    life().some().log.close()
    path = max(folder.iterdir())
    whole = again(folder).run()
    path.write_bytes(path.read_bytes()[:-5])
    cut = again(folder)
    assert cut.run().equal and cut._log.lost_bytes > 5 and cut.outcome.unanswered == 1
    assert cut.outcome.steps == whole.steps and cut.outcome.points < whole.points


def test_a_damaged_record_ends_the_replay_with_its_number(life, folder):
    life().some().log.close()
    path = max(folder.iterdir())
    data, at = bytearray(path.read_bytes()), 17
    for _ in range(9):
        at += FRAME.size + FRAME.unpack_from(data, at)[1]
    data[at + FRAME.size] ^= 1
    path.write_bytes(data)
    damaged = again(folder)
    with pytest.raises(Malformed, match=r"\.plans: record 9: got a body of another checksum"):
        damaged.run()
    assert damaged.outcome.steps >= 4 and damaged.outcome.equal


def test_results_that_answer_no_plan_are_malformed(folder, life):
    life().some().log.close()
    path = max(folder.iterdir())
    records = list(PlanLog(path).records())
    number = next(k for k, r in enumerate(records) if isinstance(r, StepResult) and r.rank is not None)
    for change, words in (
        (lambda r: StepResult(r.step + 1, r.tokens, r.finite), "no plan in flight"),
        (lambda r: replace(r, **dict.fromkeys(FULL, None)), "of the other kind than its plan"),
        (lambda r: StepResult(r.step, np.zeros(9, np.int32), np.ones(9, bool)), "no plan in flight"),
    ):
        changed(path, number, change)
        with pytest.raises(Malformed, match=f"record {number + 1}: got a result of step .*{words}"):
            again(folder).run()


def test_a_step_behind_a_failure_needs_a_reset(folder, life):
    lived = life()
    lived.submit()
    lived.lane.turn()
    lived.log.failure(0, "collect", RuntimeError())
    lived.run().log.close()
    with pytest.raises(Malformed, match="record 3: got a step on a device that had failed"):
        again(folder).run()


def test_a_plan_of_another_lane_is_refused_before_it_reaches_the_device(folder, life):
    lived = life()
    lived.some()
    lived.log.close()
    log = PlanLog(max(folder.iterdir()))
    log.header = replace(log.header, vocab=3)
    device = hash_device()
    with pytest.raises(Malformed, match="record 1: plan: got a token past the vocabulary"):
        Replay(log, device, 0.0, ManualClock()).run()
    assert not device.draws


def test_a_replay_ends_where_blocks_came_from_another_lane(folder, life):
    lived = life()
    lived.submit()
    lived.run()
    points = sum(map(len, lived.tokens.values()))
    content = lived.lane._device.gather([1, 2])
    lived.lane._device.scatter([1, 2], content)
    lived.submit()
    lived.run().log.close()
    outcome = again(folder).run()
    assert outcome.moved == 2 and outcome.different == 0 and not outcome.equal and outcome.points == points


def test_a_full_disk_stops_the_log_and_every_sequence_still_draws_its_tokens(caplog):
    log = PlanWriter(os.open("/dev/full", os.O_WRONLY), HEADER, 1 << 30)
    log.flush()
    lived = Life(log).some()
    assert log.stopped == "disk" and lived.right() and caplog.text.count("the plan log stops") == 1
    log.close()


def test_within_a_tolerance_ranks_and_lists_may_change_and_tokens_may_not():
    top, ones = np.zeros((2, TOP), np.float32), np.ones(2, np.int32)
    wanted = StepResult(1, ones, ones > 0, top[:, 0], ones, top.astype(np.int32), top)
    near = replace(wanted, logprob=top[:, 0] + 0.01, rank=ones + 1, top_ids=wanted.top_ids + 1)
    assert not differing(wanted, near, 0.02)[0].any()
    assert differing(wanted, near, 0.001)[0].all() and differing(wanted, near, 0.0)[1].what == "rank"
    unlike, first = differing(wanted, replace(near, tokens=np.array([1, 3], np.int32)), 0.02)
    assert unlike.tolist() == [False, True] and (first.point, first.wanted, first.got) == (1, 1, 3)
    spoiled = replace(wanted, logprob=np.full(2, np.nan, np.float32))
    assert not differing(spoiled, spoiled, 0.0)[0].any() and differing(wanted, spoiled, 0.02)[0].all()
