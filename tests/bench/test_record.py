import json

from bench.__main__ import BENCHES, main
from bench.record import gpu, machine, record, show


def test_a_line_holds_what_is_needed_to_make_the_figure_again(tmp_path):
    file = tmp_path / "figures.jsonl"
    says = record("host", ["--rows", "1,64", "--out", str(file), "--steps=9", f"--out={file}"])
    says.append([{"rows": 1}, {"rows": 64, "parts": {"pack": 2.5}}], file)
    says.append([{"rows": 256}], file)
    first, second, third = map(json.loads, file.read_text().splitlines())
    assert first["command"] == "python -m bench host --rows 1,64 --steps=9"
    assert second["figures"] == {"rows": 64, "parts": {"pack": 2.5}} and third["figures"] == {"rows": 256}
    assert first["kind"] == "measured" and first["versions"]["jax"] and first["machine"]["cores"] >= 1
    assert len(first["commit"]) == 40


def test_a_line_names_no_path_and_no_host(tmp_path):
    file = tmp_path / "figures.jsonl"
    places = ["--picture", str(tmp_path / "x.png"), "--out", str(file)]
    record("mesh", places).append([{"rows": 1}], file)
    assert str(tmp_path) not in file.read_text() and "/" not in json.dumps(machine())


def test_without_a_file_nothing_is_kept(tmp_path):
    record("host", []).append([{"rows": 1}], None)
    assert not list(tmp_path.iterdir())


def test_what_is_for_programs_alone_is_not_shown(capsys):
    show("title", [{"rows": 1, "tokens": [1, 2], "parts": {"pack": 1.5}}])
    assert capsys.readouterr().out.splitlines() == ["title", "  rows", "     1"]


def test_the_benches_are_listed_and_an_unknown_one_is_answered_with_the_list(capsys):
    assert main(["--help"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in BENCHES)
    assert main(["mash"]) == 2
    assert "got 'mash'; expected one of mesh" in capsys.readouterr().err


def test_a_gpu_is_named_with_its_driver_where_its_tool_is(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\n" + 2 * "echo 'NVIDIA H200, 580.1, 700.00 W, 1980 MHz'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    wanted = {"gpu": "NVIDIA H200", "driver": "580.1", "power limit": "700.00 W", "highest clock": "1980 MHz"}
    assert gpu() == wanted
    line = json.loads(record("kernels", []).lines([{"rows": 1}])[0])
    assert line["machine"].items() >= wanted.items()
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert gpu() == {}
    monkeypatch.setenv("PATH", "")
    assert gpu() == {}
