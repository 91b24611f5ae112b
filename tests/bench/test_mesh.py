import json
import sys

import pytest

from bench import mesh, mesh_lane
from bench.mesh import compare, measure, memory, short, words
from bench.picture import draw
from engine.errors import SeracError


def program(name, tokens, calls, size):
    kinds = {"all-reduce": {"calls": calls, "bytes": size}} if calls else {}
    return {"program": name, "tokens": tokens, "actual": kinds, "planned": kinds}


def made(tp, tokens):
    return {
        "mesh": f"tp={tp}",
        "axes": f"kv={tp},rep=1",
        "prefill tokens/s": 10.0,
        "decode tokens/s": 5.0,
        "decode step ms": 1.5,
        "executables": 3,
        "compile s": 2.0,
        "programs": [program("decode 4x4 plain", 4, tp - 1, 400), program("mixed 8x4 full", 8, tp - 1, 1600)],
        "collectives as planned": True,
        "memory": {part: {"actual": 2, "planned": 1} for part in ("weights", "kv", "state", "temporaries")},
        "tokens": tokens,
    }


def test_rows_are_compared_with_the_first_sequence_by_sequence():
    rows = [made(1, [[1, 2], [3, 4]]), made(2, [[1, 2], [3, 5]])]
    compare(rows)
    assert [row["equal sequences"] for row in rows] == ["2/2", "1/2"]
    assert all("tokens" not in row for row in rows)


def test_the_largest_programs_stand_for_all():
    rows = [made(2, [[1]])]
    compare(rows)
    line = short(rows[0])
    assert line["collectives a decode step"] == "1 all-reduce" and line["bytes a token"] == 100
    assert line["bytes a token, full"] == 200 and line["equal sequences"] == "1/1"
    assert [part["actual / planned"] for part in memory(rows[0])] == [2, 2, 2, 2]


def test_options_are_handed_to_each_mesh_as_they_were_given():
    assert words({"rows": 4, "random": True, "quick": False}) == ["--rows", "4", "--random"]


def test_a_picture_is_drawn(tmp_path):
    draw([made(1, []), made(2, [])], tmp_path / "mesh.png")
    assert (tmp_path / "mesh.png").read_bytes()[1:4] == b"PNG"


def test_without_matplotlib_a_line_says_what_brings_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    draw([made(1, [])], tmp_path / "mesh.png")
    assert "serac[bench]" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_mesh_that_cannot_be_measured_is_answered_with_what_its_process_said():
    with pytest.raises(SeracError, match=r"mesh 3: its process ended with code 1, saying .*tp=3 does not divide"):
        measure("3", "cpu", [])


def test_one_mesh_is_measured_beside_its_plan(capsys):
    """Costs the compilation of four programs of one layer."""
    sizes = ["--rows", "2", "--tokens", "8", "--prompt", "12", "--output", "4", "--repeats", "1"]
    assert mesh_lane.main(["--mesh", "2", "--layers", "1", "--random", "--programs", "needed", *sizes]) == 0
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert row["mesh"] == "tp=2" and row["collectives as planned"] and row["repeats equal"]
    assert [len(tokens) for tokens in row["tokens"]] == [4, 4] and row["executables"] == 3
    exact = ("weights", "kv", "state")
    assert all(row["memory"][part]["actual"] == row["memory"][part]["planned"] for part in exact)
    assert mesh.short(row | {"equal sequences": "2/2"})["collectives a decode step"] == "6 all-reduce"
