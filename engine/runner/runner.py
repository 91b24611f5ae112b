"""The only owner of device memory: StepPlans in, StepResults out, in order.

    warm_up   compiles every program of the lane, runs each once, and counts what is compiled afterwards
    launch    loads new rows, dispatches one step, returns at once; nothing has changed if it raises before dispatch
    collect   waits for the oldest step in flight
    gather    reads blocks, scatter writes them, both in order with steps (engine/runner/moves.py)
    reset     makes the device state anew, after a step that raised

Costs of the host a step: one packed integer array, one dispatch, one copy back (engine/runner/step.py).
"""

import hashlib
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from engine.core.plan import StepPlan, StepResult
from engine.errors import DeviceError
from engine.models.config import ModelConfig
from engine.runner.buckets import Bucket, fitting
from engine.runner.compiles import CompileCounter
from engine.runner.moves import MovePrograms, Staged
from engine.runner.state import (
    LOAD_ROWS,
    STATE,
    Sizes,
    empty_draws,
    empty_state,
    load_lengths,
    load_rows,
    pack_loads,
    shardings,
)
from engine.runner.step import read_result, step_program
from pallas_kernels.dispatch import Numerics

Progress = Callable[[str, int, int], None]  # (what, done, of)


@dataclass(frozen=True, slots=True)
class Model:
    """A decoder with its weights on a mesh."""

    config: ModelConfig
    weights: Mapping
    mesh: Mesh
    dtype: np.dtype
    numerics: Numerics


@dataclass(frozen=True, slots=True)
class Program:
    """A compiled step; temporaries as XLA's memory analysis states them, in bytes a device (None: not stated)."""

    bucket: Bucket
    run: Callable
    compile_s: float
    temp_bytes: int | None
    text: Callable[[], str]


class Runner:
    """Runs the steps of one lane. Not thread-safe: one thread calls it.

    move_sizes  the numbers of blocks that move at once, smallest first; empty for a lane that moves none
    """

    def __init__(self, model: Model, sizes: Sizes, choices: tuple[Bucket, ...], move_sizes: tuple[int, ...] = ()):
        self.model, self.sizes, self.buckets = model, sizes, choices
        self.moves = MovePrograms(model.mesh, model.config.num_layers, sizes.num_blocks, move_sizes)
        self.compiles = CompileCounter()
        self.programs: dict[Bucket, Program] = {}
        self._loads: dict[int, Callable] = {}
        self._flights: deque[tuple[StepPlan, jax.Array]] = deque()
        self.reset()

    def reset(self) -> None:
        """Make the device state anew; nothing is in flight afterwards."""
        self._flights.clear()
        self.state = self.draws = None  # let go of the old pools before the new ones are made
        self.state = empty_state(self.model.config, self.sizes, self.model.mesh, self.model.dtype)
        self.draws = empty_draws(self.sizes, self.model.mesh)

    def warm_up(self, progress: Progress = lambda *_: None, together: Callable[[str], None] | None = None) -> None:
        """Compile and run every program once; from now on compilations are counted as late.

        together(found)  returns when every process of the lane has compiled all, and found the same programs: one
                         that runs what another still compiles would wait in a collective
        """
        lengths = load_lengths(self.sizes.max_length)
        total = len(self.buckets) + len(lengths) + len(self.moves.sizes)
        for done, length in enumerate(lengths):
            progress(f"load {length}", done, total)
            self._loads[length] = self._compile_load(length)
        for done, size in enumerate(self.moves.sizes, len(lengths)):
            progress(f"move {size}", done, total)
            self._keep(self.moves.compile(size, self._pools))
        specs = jax.tree.map(lambda w: w.sharding.spec, self.model.weights)
        build = step_program(self.model.config, self.sizes, self.model.mesh, specs, self.model.numerics)
        digests = hashlib.sha256() if together is not None else None
        for done, bucket in enumerate(self.buckets, total - len(self.buckets)):
            progress(str(bucket), done, total)
            self.programs[bucket] = self._compile_step(build, bucket, digests)
        if together is not None and digests is not None:
            together(f"programs {digests.hexdigest()[:16]}")
        for bucket, program in self.programs.items():
            packed = np.zeros((bucket.rows, 6), np.int32)
            self.state, _ = program.run(self.model.weights, self.state, self.draws, packed)
        jax.block_until_ready(self.state)
        progress("ready", total, total)
        self.compiles.seal()

    def launch(self, plan: StepPlan) -> None:
        """Dispatch `plan`. Raises what packing or dispatching raises, before the device has changed."""
        bucket = fitting(self.buckets, plan.num_tokens, len(plan.rows), plan.one_token, not plan.plain)
        packed = plan.rows
        if len(packed) < bucket.rows:
            packed = np.zeros((bucket.rows, packed.shape[1]), np.int32)
            packed[: len(plan.rows)] = plan.rows
        if plan.loads:
            self._load(plan)
        self.state, result = self.programs[bucket].run(self.model.weights, self.state, self.draws, packed)
        result.copy_to_host_async()
        self._flights.append((plan, result))

    def collect(self) -> StepResult:
        """Wait for the oldest step in flight. Raises DeviceError when it failed: `reset` before the next launch."""
        plan, result = self._flights.popleft()
        try:
            packed = np.asarray(result)
        except jax.errors.JaxRuntimeError as error:
            raise DeviceError(f"device: step {plan.step} failed: {type(error).__name__}") from error
        return read_result(plan.step, packed, plan.num_points)

    def gather(self, blocks: Sequence[int]) -> Staged:
        """The content of `blocks` after every step launched so far, padded; at most the largest size that moves."""
        return self.moves.gather(self._pools, blocks)

    def scatter(self, blocks: Sequence[int], staged: Staged) -> None:
        """Write the first blocks of `staged` to `blocks`, before any step launched from now on.

        staged  on this lane's mesh and arrived without error, which would cost the pools; or numpy arrays of just
                these blocks, which are given away: nobody may write to them afterwards
        """
        self._keep(self.moves.scatter(self._pools, blocks, staged))

    @property
    def _pools(self) -> tuple[jax.Array, jax.Array]:
        return self.state.k, self.state.v

    def _keep(self, pools: tuple[jax.Array, jax.Array]) -> None:
        self.state = self.state._replace(k=pools[0], v=pools[1])

    def _load(self, plan: StepPlan) -> None:
        pending = sorted(plan.loads, key=lambda load: len(load.tokens))
        for first in range(0, len(pending), LOAD_ROWS):
            group = pending[first : first + LOAD_ROWS]
            length = next(size for size in self._loads if size >= len(group[-1].tokens))
            packed = pack_loads(group, self.sizes, length)
            self.state, self.draws = self._loads[length](self.state, self.draws, packed)

    def _compile_load(self, length: int) -> Callable:
        mesh, sizes = self.model.mesh, self.sizes
        replicated = shardings(mesh, jax.tree.map(lambda _: PartitionSpec(), self.draws))
        out = (shardings(mesh, STATE), replicated)

        def load(state, draws, packed):
            return load_rows(sizes, state, draws, packed)

        program = jax.jit(load, donate_argnums=(0, 1), out_shardings=out)
        self.state, self.draws = program(self.state, self.draws, pack_loads((), sizes, length))
        return program

    def _compile_step(self, build: Callable, bucket: Bucket, digests: "hashlib._Hash | None") -> Program:
        """digests  is given what the program is before XLA sees it, which two processes compile from alike"""
        packed = np.zeros((bucket.rows, 6), np.int32)
        began = time.perf_counter()
        lowered = build(bucket).lower(self.model.weights, self.state, self.draws, packed)
        if digests is not None:
            digests.update(lowered.as_text().encode())
        run = lowered.compile()
        took = time.perf_counter() - began
        analysis = run.memory_analysis()
        temp = None if analysis is None else int(analysis.temp_size_in_bytes)
        return Program(bucket, run, took, temp, run.as_text)
