import itertools
import json

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from bench import matmul
from bench.matmul import main, measure, products
from pallas_kernels.quantised import quantise
from sharding.mesh import MeshSpec, lane_meshes


def test_a_ratio_is_that_to_the_plain_runs_around_it(monkeypatch):
    clock = {"at": 0.0}  # which only runs move
    monkeypatch.setattr(matmul.time, "perf_counter", lambda: clock["at"])

    def taking(*seconds):
        times = itertools.cycle(seconds)
        return lambda: clock.update(at=clock["at"] + next(times))

    slow, fast = measure(taking(2.0), {"slow": taking(6.0), "fast": taking(1.0)}, rounds=3)
    assert slow == {"weights": "slow", "ratio": 3.0, "ratio low": 3.0, "ratio high": 3.0}
    assert fast["weights"] == "fast" and fast["ratio"] == pytest.approx(0.5)


def test_every_matrix_is_multiplied_in_turn():
    mesh = lane_meshes(MeshSpec(), 8, 2, jax.devices()[:1])[0]
    matrices = jax.device_put(
        [quantise(jnp.ones((128, 16)), "int8"), jnp.ones((128, 24))], NamedSharding(mesh, P())
    )
    run = products(matrices, mesh, rows=12, dynamic=True)
    text = run.__closure__[[name for name in run.__code__.co_freevars].index("run")].cell_contents.as_text()
    assert "s8[16,128]" in text and "f32[128,24]" in text and run() is not None


def test_a_row_for_each_kind_and_number_of_rows_is_recorded(tmp_path, monkeypatch):
    """Costs the compilation of a few products."""
    monkeypatch.setattr(matmul, "RUN_S", 0.0)
    out = tmp_path / "figures.jsonl"
    asked = ["--model", "embedded", "--layers", "1", "--kinds", "int8", "--rows", "1,2", "--rounds", "1"]
    assert main([*asked, "--out", str(out)]) == 0
    rows = [json.loads(line)["figures"] for line in out.read_text().splitlines()]
    assert [(row["rows"], row["weights"]) for row in rows] == [
        (rows, weights) for rows in (1, 2) for weights in ("int8", "int8 dynamic")
    ]
    assert all(0 < row["ratio low"] <= row["ratio"] <= row["ratio high"] for row in rows)
