import json

from bench.__main__ import BENCHES, main
from bench.record import machine, record, show
from engine.tables import readable, show_table


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
    record("host", ["--out", str(file)]).append([{"rows": 1}], file)
    assert str(tmp_path) not in file.read_text() and "/" not in json.dumps(machine())


def test_without_a_file_nothing_is_kept(tmp_path):
    record("host", []).append([{"rows": 1}], None)
    assert not list(tmp_path.iterdir())


def test_a_table_for_a_program_is_aligned_text(capsys):
    show("title", [{"rows": 1, "us": 3.14159, "detail": [1, 2]}, {"rows": 4096, "us": 1234.5, "ok": True}])
    assert capsys.readouterr().out.splitlines() == [
        "title",
        "   rows     us  ok",
        "      1   3.14",
        "  4,096  1,234  yes",
    ]


def test_a_table_for_a_person_is_drawn():
    class Terminal:
        text = ""

        def isatty(self):
            return True

        def write(self, text):
            self.text += text

        def flush(self):
            pass

    out = Terminal()
    show_table("title", [{"a": 1.5, "b": None}], out)
    assert "title" in out.text and "1.5" in out.text and "─" in out.text


def test_a_cell_is_short():
    assert [readable(v) for v in (None, False, 12345, 0.00123456, 98765.4, {"a": 1.0})] == [
        "",
        "no",
        "12,345",
        "0.00123",
        "98,765",
        "a 1",
    ]


def test_the_benches_are_listed_and_an_unknown_one_is_answered_with_the_list(capsys):
    assert main(["--help"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in BENCHES)
    assert main(["mash"]) == 2
    assert "got 'mash'; expected one of mesh" in capsys.readouterr().err
