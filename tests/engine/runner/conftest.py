"""A tiny model of odd widths on any mesh, and a lane around it that a test turns by hand."""

import jax
import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from engine.clock import ManualClock
from engine.core import prefix
from engine.core.agent import Agent
from engine.core.events import Emission
from engine.core.messages import Over, Scored
from engine.core.request import Request, Sampling, Stopping
from engine.core.scheduler import LaneShape, Scheduler
from engine.models.config import ModelConfig, Rope
from engine.observe.metrics import Metrics
from engine.replica.lane import Lane
from engine.runner.buckets import Bucket
from engine.runner.runner import Model, Runner
from engine.runner.state import Sizes
from engine.weights.drawn import random_weights
from sharding.mesh import MeshSpec, lane_meshes

CONFIG = ModelConfig(
    architecture="Qwen3ForCausalLM",
    num_layers=2,
    width=72,
    ffn=91,
    heads=8,
    kv_heads=2,
    head_width=16,
    vocab=211,
    context=512,
    norm_eps=1e-6,
    rope=Rope("default", 10000.0),
    qk_norm=True,
    qkv_bias=False,
    o_bias=False,
    mlp_bias=False,
    tied=False,
    windows=(None, 40),
)
SIZES = Sizes(num_blocks=400, block_size=16, max_rows=32, max_length=160)


def both(tokens: int, rows: int, one_token: bool) -> tuple[Bucket, Bucket]:
    return Bucket(tokens, rows, one_token, False), Bucket(tokens, rows, one_token, True)


CHOICES = (*both(4, 4, True), *both(32, 32, True), *both(64, 32, False), *both(256, 32, False))


class HandLane:
    """Scheduler, runner and loop of one lane; tokens, scores and ends as they came."""

    def __init__(
        self, runner: Runner, max_tokens: int = 256, max_rows: int = 32, num_blocks: int = SIZES.num_blocks
    ):
        runner.reset()
        sizes = runner.sizes
        shape = LaneShape(num_blocks, sizes.block_size, max_rows, max_tokens, sizes.max_length, CONFIG.vocab)
        self.scheduler, self.runner = Scheduler(shape, prefix.root("tiny")), runner
        self.tokens: dict[tuple[str, int], list[int]] = {}
        self.logprobs: dict[tuple[str, int], list[float]] = {}
        self.ended: dict[tuple[str, int], Over] = {}
        self.scored: list[Scored] = []
        self._keys: dict[int, tuple[str, int]] = {}
        metrics = Metrics(CollectorRegistry())
        self.lane = Lane(Agent("test", self.scheduler), runner, ManualClock(), metrics)
        self.lane.connect(self._take)

    def submit(self, name: str, prompt, seed: int = 0, **options):
        stopping = {key: options.pop(key) for key in list(options) if key in Stopping.__dataclass_fields__}
        request = Request(name, tuple(map(int, prompt)), Sampling(seed=seed, **options), Stopping(**stopping))
        group = self.scheduler.submit(request, seed)
        for sequence in group:
            self._keys[sequence.serial] = key = (name, sequence.choice)
            self.tokens[key], self.logprobs[key] = [], []
        return group

    def run(self):
        while self.lane.turn():
            self.scheduler.check()
        return self

    def _take(self, name, said):
        for _, event in said:
            if isinstance(event, Emission):
                scores = [0.0] * len(event.tokens) if event.logprob is None else event.logprob.tolist()
                for serial, token, score in zip(event.serials.tolist(), event.tokens.tolist(), scores, strict=True):
                    self.tokens[self._keys[serial]].append(token)
                    self.logprobs[self._keys[serial]].append(score)
            elif isinstance(event, Over):
                self.ended[self._keys[event.serial]] = event
            elif isinstance(event, Scored):
                self.scored.append(event)


@pytest.fixture(scope="session")
def make_runner():
    """`make_runner(tp, numerics, dtype)`: a warm runner of the tiny model on devices from `first` on, made once."""
    made = {}

    def make(
        tp: int = 1, numerics: str = "invariant", dtype=np.float32, choices=CHOICES, move_sizes=(), first=0
    ) -> Runner:
        key = (tp, numerics, np.dtype(dtype).name, choices, move_sizes, first)
        if key not in made:
            mesh = lane_meshes(MeshSpec(tp=tp), CONFIG.heads, CONFIG.kv_heads, jax.devices()[first:])[0]
            weights = random_weights(CONFIG, mesh, np.dtype(dtype), seed=3)
            made[key] = Runner(Model(CONFIG, weights, mesh, np.dtype(dtype), numerics), SIZES, choices, move_sizes)
            made[key].warm_up()
        return made[key]

    return make


@pytest.fixture(scope="session")
def hand_lane():
    """The class HandLane."""
    return HandLane
