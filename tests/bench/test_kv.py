import itertools

import jax
import numpy as np
import pytest

from bench import kv
from bench.kv import Pair, main, measure, nothing
from engine.errors import SeracError
from engine.movers.checksums import checksums


@pytest.fixture(scope="module")
def pair():
    return Pair((2, 4), 1 << 18, 16)


def test_a_pair_moves_as_many_bytes_as_it_says(pair):
    staged = [pair.source.gather(pair.pools[0], blocks) for blocks, _ in pair.pieces]
    assert sum(array.nbytes for each in staged for array in each) == pair.num_bytes == 1 << 18
    assert [len(set(mesh.devices.flat)) for mesh in (pair.source.mesh, pair.target.mesh)] == [2, 4]


@pytest.mark.parametrize("summed", [checksums, nothing])
def test_every_block_of_a_whole_move_stands_in_the_other_pool(pair, summed):
    pair.pools[1] = jax.tree.map(lambda pool: pool * 0, pair.pools[1])
    pair.move(summed)
    for from_blocks, to_blocks in pair.pieces:
        sent = pair.source.gather(pair.pools[0], from_blocks)
        got = pair.target.gather(pair.pools[1], to_blocks)
        assert np.array_equal(np.asarray(sent.keys_KLnCH), np.asarray(got.keys_KLnCH))


def test_a_block_that_changes_on_its_way_ends_the_bench(pair):
    calls = itertools.count()
    with pytest.raises(SeracError, match="changed on their way"):
        pair.move(lambda keys, values: np.array([next(calls)], np.uint64))


def test_a_ratio_is_the_time_of_the_memcpy_over_that_of_the_move(monkeypatch):
    class Scripted:
        num_bytes = 4_000_000

        def __getattr__(self, name):
            return lambda *summed: waits.append(3.0 if summed == (checksums,) else 1.0)

    waits, now = [], [0.0]

    def clock():
        now[0] += 0.002 * sum(waits)
        waits.clear()
        return now[0]

    monkeypatch.setattr(kv.time, "perf_counter", clock)
    figures = measure(Scripted(), turns=3)
    assert figures["memcpy GB/s"] == pytest.approx(2) and figures["bare"] == pytest.approx(1)
    assert figures["moved"] == pytest.approx(1 / 3) and figures["checksums' share"] == pytest.approx(2 / 3)
    assert figures["moved ms"] == pytest.approx(6)


def test_the_bench_prints_a_row_a_pair_and_size(capsys, tmp_path):
    assert main(["--pairs", "1:2", "--most", "0.0625", "--turns", "1", "--out", str(tmp_path / "kv.jsonl")]) == 0
    assert "1:2" in capsys.readouterr().out and (tmp_path / "kv.jsonl").read_text().count("\n") == 1
