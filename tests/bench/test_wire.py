import json

from bench.wire import LAYER_BYTES, SIZES, main, measure, part_of, shape
from bench.wire_nixl import installed
from engine.movers.parts import num_bytes


def test_a_part_has_as_many_bytes_as_it_says():
    for size in SIZES[:4]:
        assert num_bytes(part_of(size)[1]) == size
    assert shape(LAYER_BYTES) == (1, 1) and shape(64 << 20) == (32, 32)


def test_every_way_moves_parts_to_another_process():
    figures = measure(1 << 16, 1)
    assert set(figures) >= {"memcpy GB/s", "tcp", "tls", "unix", "shared", "tcp bare", "unix bare", "shared bare"}
    assert all(value > 0 for value in figures.values()) and figures["shared %"] > 50
    assert ("nixl" in figures) == ("nixl bare" in figures) == installed() and figures.get("nixl %", 100) > 50


def test_each_size_is_a_row(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("bench.wire.measure", lambda size, turns: {"tcp": size / turns})
    out = tmp_path / "figures.jsonl"
    assert main(["--most", "0.25", "--turns", "2", "--out", str(out)]) == 0
    rows = [json.loads(line)["figures"] for line in out.read_text().splitlines()]
    assert rows == [{"KiB": 64, "tcp": 32768.0}, {"KiB": 256, "tcp": 131072.0}]
    assert "262,144" not in capsys.readouterr().out
