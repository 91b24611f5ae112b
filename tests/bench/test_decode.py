import dataclasses
import itertools

import jax
import numpy as np
import pytest

from bench import decode
from bench.bandwidth import Reader
from bench.decode import make, measure, products, shape_of
from engine.weights.drawn import random_weights
from sharding.mesh import MeshSpec, lane_meshes


class SteadyReader:
    """A reading takes 2 ms by its own account."""

    num_bytes = 4_000_000

    def seconds(self):
        return 0.002


def test_a_reader_reads_all_of_it():
    with Reader(1_000_001, threads=2) as reader:
        assert reader.num_bytes == 1_000_000 and 0 < reader.seconds() < 5


def test_the_ratio_is_a_step_over_the_readings_around_it(monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr(decode.time, "perf_counter", lambda: next(ticks) * 0.006)
    figures = measure(lambda: None, SteadyReader(), pairs=3)
    assert figures["read ms"] == 2 and figures["read GB/s"] == 2
    assert figures["ratio"] == pytest.approx(figures["step ms"] / 2)


def test_a_step_decodes_every_row_over_its_positions():
    """Costs the compilation of one step of one layer."""
    config = dataclasses.replace(shape_of("embedded", 1), vocab=64, ffn=32)
    mesh = lane_meshes(MeshSpec(), config.heads, config.kv_heads, jax.devices()[:1])[0]
    step = make(config, random_weights(config, mesh, np.dtype(np.float32)), mesh, rows=2, positions=20)
    runner = step.__closure__[[name for name in step.__code__.co_freevars].index("runner")].cell_contents
    before = np.asarray(runner.state.history_RS)
    step()
    after = np.asarray(runner.state.history_RS)
    changed = np.argwhere(before != after)
    assert set(changed[:, 1].tolist()) <= {20} and np.count_nonzero(np.asarray(runner.state.k)) > 0


def test_products_alone_are_a_program_of_their_own():
    config = dataclasses.replace(shape_of("embedded", 1), vocab=64, ffn=32)
    mesh = lane_meshes(MeshSpec(), config.heads, config.kv_heads, jax.devices()[:1])[0]
    run = products(random_weights(config, mesh, np.dtype(np.float32)), mesh, rows=2)
    text = run.__closure__[[name for name in run.__code__.co_freevars].index("run")].cell_contents.as_text()
    assert text.count("layer") == 0 and run() is not None


def test_a_shape_may_be_cut_to_fewer_layers():
    assert shape_of("qwen3-0.6b", None).num_layers == 28
    cut = shape_of("qwen3-0.6b", 3)
    assert cut.num_layers == 3 and len(cut.windows) == 3
