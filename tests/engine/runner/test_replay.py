"""The real runner, logged and run again: the same results on its own mesh, in invariant numerics on another too."""

import dataclasses

import numpy as np
import pytest

from engine.clock import ManualClock
from engine.core.plan import StepResult
from engine.observe.plan_log import Header, PlanLog
from engine.observe.plan_writer import open_log
from engine.replica.recorded import Recorded
from engine.replica.replay import Replay

OPTIONS = (
    {"temperature": 0.0},
    {"temperature": 0.9},
    {"top_k": 5, "top_p": 0.9, "min_p": 0.01},
    {"logprobs": 20, "n": 2},
    {"prompt_logprobs": 3},
    {"repetition_penalty": 1.3, "frequency_penalty": 0.5, "presence_penalty": 0.25},
    {"logit_bias": ((7, 3.5), (9, -8.0)), "min_tokens": 3, "stop_token_ids": (3, 5)},
)


def logged(runner, hand_lane, folder, fail_at: int = 0) -> PlanLog:
    """What a lane of `runner` did for requests of every kind; the device fails once at collect `fail_at`."""
    sizes, model = runner.sizes, runner.model
    header = Header(
        **dataclasses.asdict(sizes) | {"kv_dtype": "auto"},
        **{"lane": "0", "model": "tiny", "revision": "r", "device": "cpu", "serac": "", "jax": "", "jaxlib": ""},
        dtype=str(model.dtype),
        numerics=model.numerics,
        mesh=f"tp={model.mesh.size}",
        max_tokens=64,
        vocab=model.config.vocab,
    )
    lane = hand_lane(runner, max_tokens=64)
    lane.lane._device = recorded = Recorded(Failing(runner, fail_at), open_log(folder, header, 1 << 30))
    for k, options in enumerate(OPTIONS):
        prompt = np.random.default_rng(k).integers(0, 211, 5 + 13 * k)
        lane.submit(f"{k}", prompt, seed=k, max_tokens=6, **options)
    lane.run()
    recorded.log.close()
    return PlanLog(max(folder.iterdir()))


class Failing:
    """A runner that fails one collect, if any."""

    def __init__(self, runner, fail_at: int):
        self.runner, self.left = runner, fail_at
        self.launch, self.reset = runner.launch, runner.reset

    def collect(self) -> StepResult:
        self.left -= 1
        result = self.runner.collect()
        if self.left == 0:
            raise RuntimeError("injected")
        return result


def replay(log: PlanLog, runner, tolerance: float = 0.0):
    runner.reset()
    return Replay(log, runner, tolerance, ManualClock()).run()


@pytest.mark.parametrize("tp", [1, 2])
def test_a_logged_life_comes_out_again_bit_for_bit_also_on_another_mesh(make_runner, hand_lane, tmp_path, tp):
    log = logged(make_runner(1), hand_lane, tmp_path / "plans")
    outcome = replay(log, make_runner(tp))
    assert outcome.equal and outcome.points > 60 and outcome.steps > 8 and outcome.rows > outcome.steps


def test_a_reset_is_replayed_too(make_runner, hand_lane, tmp_path):
    log = logged(make_runner(1, "fast"), hand_lane, tmp_path / "plans", fail_at=5)
    outcome = replay(log, make_runner(1, "fast"))
    assert outcome.equal and (outcome.resets, outcome.failures) == (1, 1) and outcome.points > 60


def test_another_model_is_told_apart_at_its_first_point(make_runner, hand_lane, tmp_path):
    runner = make_runner(1, "fast")
    log = logged(runner, hand_lane, tmp_path / "plans")
    healthy, embed = runner.model, runner.model.weights["embed_VD"]
    runner.model = dataclasses.replace(healthy, weights=dict(healthy.weights) | {"embed_VD": embed * 1.5})
    try:
        outcome = replay(log, runner)
    finally:
        runner.model = healthy
    assert not outcome.equal and outcome.different > 20 and outcome.first.step < 3
