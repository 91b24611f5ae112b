"""The scheduler against a device that is a hash: whatever shares a step, a sequence draws what it draws alone."""

import random

import numpy as np
import pytest

from engine.core import arrivals, prefix
from engine.core.events import Emission, Ended, Scored
from engine.core.request import Request, Sampling, Stopping
from engine.core.scheduler import LaneShape, Scheduler
from engine.core.sequence import State
from engine.errors import DeadlineExceeded, DeviceError, NumericError
from engine.sim.runner import ModelledRunner, alone

VOCAB, EOS = 997, 996


class Lane:
    """A scheduler and a hash device, stepped by hand with `depth` steps in flight."""

    def __init__(self, num_blocks=40, block_size=4, max_rows=6, max_tokens=16, max_length=64, depth=2):
        self.shape = LaneShape(num_blocks, block_size, max_rows, max_tokens, max_length, VOCAB, (EOS,))
        self.scheduler = Scheduler(self.shape, prefix.root("test"))
        self.device = ModelledRunner(num_blocks, block_size, max_rows, max_length, VOCAB)
        self.depth, self.now = depth, 0.0
        self.got: dict[int, list[int]] = {}
        self.ended: dict[int, Ended] = {}
        self.scored: list[Scored] = []
        self.plans = []

    def submit(self, prompt, seed=1, deadline_at=None, **options):
        stopping = Stopping(**{k: options.pop(k) for k in list(options) if k in Stopping.__dataclass_fields__})
        request = Request(f"r{seed}", tuple(prompt), Sampling(seed=seed, **options), stopping, deadline_at)
        group = self.scheduler.submit(request, seed)
        for sequence in group:
            self.got[sequence.serial] = []
        return group[0] if len(group) == 1 else group

    def turn(self):
        """One turn of the loop; False when nothing was to do."""
        scheduler = self.scheduler
        plan = scheduler.plan(self.now) if len(scheduler.flights) < self.depth else None
        if plan is not None:
            self.plans.append(plan)
            self._launch(plan)
        elif scheduler.flights:
            self._collect()
        scheduler.check()
        self._take()
        return plan is not None or not scheduler.idle

    def _launch(self, plan):
        try:
            self.device.launch(plan)
        except RuntimeError:
            self.device.launch(plan)  # nothing has changed: the same plan again

    def _collect(self):
        step = self.scheduler.flights[0].plan.step
        try:
            result = self.device.collect()
        except RuntimeError as error:
            self.device.reset()
            self.scheduler.fail(step, str(error))
        else:
            self.scheduler.collect(result)

    def _take(self):
        events, self.scheduler.events = self.scheduler.events, []
        for event in events:
            if isinstance(event, Emission):
                for serial, token in zip(event.serials.tolist(), event.tokens.tolist(), strict=True):
                    assert serial not in self.ended, "a token after the terminal"
                    self.got[serial].append(token)
            elif isinstance(event, Scored):
                self.scored.append(event)
            elif isinstance(event, Ended):
                assert event.sequence.serial not in self.ended, "two terminals"
                self.ended[event.sequence.serial] = event

    def run(self, turns=5000):
        for _ in range(turns):
            if not self.turn():
                return self
        raise AssertionError("stuck")

    def right(self, sequence):
        """`sequence` drew a prefix of what it draws alone, whole if it ended by length."""
        got, request = self.got[sequence.serial], sequence.request
        want = alone(request.prompt_ids, sequence.draw, max(len(got), 1), VOCAB)[: len(got)]
        if self.ended[sequence.serial].reason == "length":
            assert len(got) == sequence.limit - sequence.prompt_length
        return got == want

    @property
    def restored(self):
        return self.scheduler.pool.available == self.shape.num_blocks - 1


def prompt(length, seed=0):
    return random.Random(seed).choices(range(VOCAB - 1), k=length)


def test_a_long_prompt_is_chunked_beside_decodes():
    lane = Lane(max_tokens=8)
    lane.submit(prompt(5), max_tokens=9)
    lane.submit(prompt(20, 1), seed=2, max_tokens=3)
    lane.run()
    assert [plan.rows[:, 1:3].tolist() for plan in lane.plans[:3]] == [
        [[0, 5], [0, 3]],
        [[5, 1], [3, 7]],
        [[6, 1], [10, 7]],
    ]
    assert all(lane.right(event.sequence) for event in lane.ended.values())


def test_plan_n_plus_1_is_made_while_step_n_flies():
    lane = Lane()
    lane.submit(prompt(5), max_tokens=9)
    lane.turn(), lane.turn()
    assert len(lane.scheduler.flights) == 2 and lane.plans[1].rows[0, 1] == 5


def test_a_row_that_needs_its_last_token_on_the_host_skips_one_step():
    lane = Lane()
    sequence = lane.submit(prompt(5), max_tokens=4)
    sequence.host_bound = True
    lane.turn(), lane.turn()
    assert len(lane.plans) == 1, "planned over a token nobody knows"
    lane.run()
    assert lane.right(sequence) and lane.ended[sequence.serial].reason == "length"


def test_the_second_request_reuses_the_published_prefix():
    lane = Lane()
    lane.submit(prompt(10), max_tokens=1)
    lane.run()
    second = lane.submit(prompt(10), seed=2, max_tokens=2)
    lane.run()
    assert second.cached == 8 and lane.plans[1].rows[0, 1:3].tolist() == [8, 2] and lane.right(second)


def test_salt_and_adapter_keep_prefixes_apart():
    lane = Lane()
    lane.submit(prompt(10), max_tokens=1)
    lane.run()
    for k, change in enumerate(({"salt": b"x"}, {"adapter": "a"})):
        request = Request(f"s{k}", tuple(prompt(10)), stopping=Stopping(max_tokens=1), **change)
        sequence = lane.scheduler.submit(request, 1)[0]
        lane.got[sequence.serial] = []
        lane.run()
        assert sequence.cached == 0


def test_generated_tokens_are_found_by_the_next_turn_of_a_chat():
    lane = Lane()
    first = lane.submit(prompt(6), max_tokens=7)
    lane.run()
    follow = lane.submit([*prompt(6), *lane.got[first.serial], 5], seed=2, max_tokens=2)
    lane.run()
    assert follow.cached == 12 and lane.right(follow)


def test_a_fully_cached_prompt_still_computes_its_last_token():
    lane = Lane()
    lane.submit(prompt(8), max_tokens=1)
    lane.run()
    second = lane.submit(prompt(8), seed=2, max_tokens=1)
    lane.run()
    assert lane.plans[-1].rows[0, 1:3].tolist() == [4, 4] and lane.right(second)


def test_choices_share_the_blocks_of_the_prompt():
    lane = Lane(num_blocks=20, max_length=40)
    group = lane.submit(prompt(33), n=4, max_tokens=4)
    lane.run()
    assert all(lane.right(sequence) for sequence in group)
    assert [sequence.cached for sequence in group] == [0, 32, 32, 32]
    assert len({tuple(lane.got[sequence.serial]) for sequence in group}) == 4


def test_the_pool_may_be_smaller_than_its_sequences_and_all_still_finish():
    lane = Lane(num_blocks=9, max_rows=4, max_length=32)
    group = [lane.submit(prompt(6, k), seed=k + 1, max_tokens=20) for k in range(4)]
    lane.run()
    assert lane.scheduler.preemptions > 0 and all(lane.right(s) for s in group) and lane.restored


def test_a_deadline_ends_a_sequence_wherever_it_is():
    lane = Lane(max_rows=1)
    running = lane.submit(prompt(5), max_tokens=50, deadline_at=10.0)
    waiting = lane.submit(prompt(5, 1), seed=2, max_tokens=50, deadline_at=5.0)
    for _ in range(6):
        lane.turn()
    lane.now = 6.0
    lane.turn(), lane.turn()
    assert isinstance(lane.ended[waiting.serial].error, DeadlineExceeded) and running.serial not in lane.ended
    lane.now = 11.0
    lane.run()
    assert lane.ended[running.serial].reason == "deadline" and lane.restored


def test_blocks_of_a_cancelled_sequence_are_free_when_the_last_step_is_collected():
    lane = Lane()
    sequence = lane.submit(prompt(9), max_tokens=50)
    for _ in range(6):
        lane.turn()
    assert len(lane.scheduler.flights) == 2
    lane.scheduler.cancel(sequence)
    lane.scheduler.check()
    assert not lane.restored, "freed under a step that still reads"
    while lane.scheduler.flights:
        lane.scheduler.collect(lane.device.collect())
    assert lane.restored


def test_eos_and_stop_ids_end_a_sequence_and_ignore_eos_does_not():
    want = alone(prompt(5), Lane().submit(prompt(5), max_tokens=30).draw, 30, VOCAB)
    for options, reason, length in (
        ({"stop_token_ids": (want[3],)}, "stop", want.index(want[3]) + 1),
        ({"stop_token_ids": (EOS,), "ignore_eos": True}, "length", 30),
    ):
        lane = Lane()
        sequence = lane.submit(prompt(5), max_tokens=30, **options)
        lane.run()
        assert lane.ended[sequence.serial].reason == reason and len(lane.got[sequence.serial]) == length


def test_eos_is_watched_unless_it_is_ignored():
    lane = Lane()
    sequence = lane.submit(prompt(5), max_tokens=30)
    token = alone(prompt(5), sequence.draw, 3, VOCAB)[2]
    lane.scheduler.rows.eos_ids = (token,)
    lane.scheduler.rows.eos = frozenset({EOS})
    ignoring = lane.submit(prompt(5), seed=1, max_tokens=30, ignore_eos=True)
    lane.run()
    assert len(lane.got[sequence.serial]) == 3 and len(lane.got[ignoring.serial]) == 30


def test_prompt_tokens_are_scored_once_each_in_order_whatever_the_chunks():
    lane = Lane(max_rows=3, max_tokens=7)
    sequence = lane.submit(prompt(23), prompt_logprobs=2, max_tokens=4)
    other = lane.submit(prompt(9, 3), seed=2, max_tokens=9)
    lane.run()
    positions = [event.first + k for event in lane.scored for k in range(len(event.logprob))]
    assert positions == list(range(1, 23)) and lane.right(sequence) and lane.right(other)
    scores = np.concatenate([event.logprob for event in lane.scored])
    assert np.allclose(scores, [-token / 100 for token in prompt(23)[1:]])


def test_non_finite_logits_end_that_sequence_only_and_its_blocks_are_forgotten():
    lane = Lane()
    lane.device.spoiled.add(2)
    good, bad = lane.submit(prompt(9), max_tokens=6), lane.submit(prompt(9, 1), seed=2, max_tokens=6)
    lane.run()
    assert isinstance(lane.ended[bad.serial].error, NumericError) and lane.got[bad.serial] == []
    assert lane.right(good) and lane.restored
    lane.device.spoiled.clear()
    again = lane.submit(prompt(9, 1), seed=2, max_tokens=6)
    lane.run()
    assert again.cached == 0 and lane.right(again)


def test_a_step_that_raises_before_launch_is_made_again():
    lane = Lane()
    lane.device.fail_launch.add(3)
    group = [lane.submit(prompt(9, k), seed=k + 1, max_tokens=8) for k in range(3)]
    lane.run()
    assert all(lane.right(sequence) for sequence in group) and not lane.device.fail_launch


@pytest.mark.parametrize("step", [0, 1, 4, 7])
def test_after_a_device_failure_every_sequence_goes_on_token_for_token(step):
    lane = Lane()
    lane.device.fail_collect.add(step)
    group = [lane.submit(prompt(9, k), seed=k + 1, max_tokens=8) for k in range(3)]
    lane.run()
    assert all(lane.right(s) and lane.ended[s.serial].reason == "length" for s in group) and lane.restored


def test_a_sequence_whose_lone_step_raises_ends_alone():
    lane = Lane()
    lane.device.poison.add(2)
    group = [lane.submit(prompt(9, k), seed=k + 1, max_tokens=8) for k in range(3)]
    lane.run()
    assert isinstance(lane.ended[group[1].serial].error, DeviceError)
    assert lane.right(group[0]) and lane.right(group[2]) and lane.restored


def test_a_held_sequence_pauses_and_goes_on():
    lane = Lane()
    sequence = lane.submit(prompt(5), max_tokens=12)
    for _ in range(6):
        lane.turn()
    lane.scheduler.hold(sequence, True)
    for _ in range(6):
        lane.turn()
    seen = len(lane.got[sequence.serial])
    assert not lane.turn() or len(lane.got[sequence.serial]) == seen < 12
    lane.scheduler.hold(sequence, False)
    lane.run()
    assert lane.right(sequence)


def test_after_a_failure_a_prompt_that_rested_is_computed_first_again():
    lane = Lane(max_rows=1)
    rested = [
        arrivals.prefill(lane.scheduler, Request("r", tuple(prompt(9, k)), Sampling()), 90 + k) for k in (1, 2)
    ]
    for _ in range(8):
        lane.turn()
    assert [sequence.state for sequence in rested] == [State.RESTING] * 2
    running, waiting = lane.submit(prompt(5), max_tokens=9), lane.submit(prompt(5, 3), max_tokens=2)
    lane.turn()
    lane.device.reset()
    lane.scheduler.fail(None, "the device is gone")
    assert list(lane.scheduler.waiting) == [*rested, running, waiting]
    for _ in range(8):
        lane.turn()
    assert [sequence.state for sequence in rested] == [State.RESTING] * 2
    for sequence in rested:
        lane.scheduler.cancel(sequence)
    lane.run()
    assert lane.right(running) and lane.right(waiting) and lane.restored


def test_a_suspect_whose_prompt_the_one_before_it_computed_rests_and_is_no_suspect_any_more():
    lane = Lane(max_rows=2)
    one, two = (
        arrivals.prefill(lane.scheduler, Request("r", tuple(prompt(9)), Sampling()), 90 + k) for k in (1, 2)
    )
    lane.turn()
    lane.device.reset()
    lane.scheduler.fail(lane.plans[-1].step, "the step failed")
    assert list(lane.scheduler.suspects) == [one, two]
    other = lane.submit(prompt(5, 3), max_tokens=2)
    for _ in range(8):
        lane.turn()
    assert one.state is two.state is State.RESTING and one.blocks == two.blocks and not lane.scheduler.suspects
    assert lane.ended[other.serial].reason == "length" and lane.right(other)


@pytest.mark.parametrize("beside", [False, True])
def test_a_sequence_held_before_it_is_seated_keeps_the_record_of_its_row(beside):
    """It is seated, but no step takes it: a plan that is none must not take its record away."""
    lane = Lane()
    other = lane.submit(prompt(9, 1), seed=2, max_tokens=3) if beside else None
    sequence = lane.submit(prompt(5), max_tokens=4)
    lane.scheduler.hold(sequence, True)
    for _ in range(12):
        lane.turn()
    row, planned = sequence.row, len(lane.plans)
    assert row >= 0 and lane.got[sequence.serial] == [] and (planned > 0) == beside
    lane.scheduler.hold(sequence, False)
    lane.run()
    assert lane.right(sequence) and (other is None or lane.right(other)) and lane.restored
    assert sum(load.row == row for plan in lane.plans for load in plan.loads) == 1


@pytest.mark.parametrize("seed", range(40))
def test_a_random_life_keeps_every_invariant_and_every_token(seed):
    rng = random.Random(seed)
    lane = Lane(
        num_blocks=rng.randint(11, 40),
        block_size=rng.choice([2, 4]),
        max_rows=rng.randint(1, 6),
        max_tokens=rng.randint(6, 24),
        max_length=20,
        depth=rng.randint(1, 3),
    )
    known = []
    for _ in range(150):
        move = rng.random()
        if move < 0.25:
            words = rng.choice(
                [prompt(16, rng.randrange(3))[: rng.randint(1, 16)], prompt(rng.randint(1, 16), rng.random())]
            )
            room = 20 - len(words)
            made = lane.submit(
                words,
                seed=rng.randrange(5),
                n=rng.choice([1, 1, 3]),
                prompt_logprobs=rng.choice([None, None, 1]),
                max_tokens=rng.randint(1, room),
                deadline_at=rng.choice([None, lane.now + rng.randint(1, 60)]),
            )
            known += made if isinstance(made, list) else [made]
        elif move < 0.3 and known:
            lane.scheduler.cancel(rng.choice(known))
        elif move < 0.32:
            lane.device.fail_collect.add(len(lane.plans))
        elif move < 0.34:
            lane.device.fail_launch.add(len(lane.plans))
        elif move < 0.44 and known:
            lane.scheduler.hold(rng.choice(known), rng.random() < 0.5)
        lane.now += 1
        lane.turn()
    for sequence in known:
        lane.scheduler.hold(sequence, False)
    lane.run()
    assert len(lane.ended) == len(known) and all(lane.right(sequence) for sequence in known) and lane.restored
