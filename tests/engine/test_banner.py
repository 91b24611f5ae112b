"""What a starting server tells a person and a program."""

import io
import json

from engine import banner
from engine.progress import Bars, Lines, progress

MEMORY = {"weights": "5 MiB", "kv": "1 GiB"}
FACTS = {
    "grpc": "127.0.0.1:1",
    "mesh": "tp=8",
    "memory": MEMORY,
    "buckets": ["a", "b"],
}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_program_gets_one_json_line():
    out = io.StringIO()
    banner.show("serac 1 tiny", FACTS, out)
    assert json.loads(out.getvalue()) == {"event": "ready", "title": "serac 1 tiny", **FACTS}
    assert out.getvalue().count("\n") == 1


def test_a_person_gets_aligned_lines():
    out = Terminal()
    banner.show("serac 1 tiny", FACTS, out)
    assert out.getvalue().splitlines() == [
        "serac 1 tiny",
        "  grpc     127.0.0.1:1",
        "  mesh     tp=8",
        "  memory   weights 5 MiB, kv 1 GiB",
        "  buckets  a, b",
    ]


def test_bytes_have_three_digits_and_a_binary_unit():
    assert [banner.size(x) for x in (0, 1023, 1024, 5 * 2**20 + 2**17, 2**31, 3 * 2**40)] == [
        "0 B", "1.02e+03 B", "1 KiB", "5.12 MiB", "2 GiB", "3 TiB",
    ]  # fmt: skip


def test_a_log_hears_of_each_stage_and_then_rarely():
    out, now = io.StringIO(), [0.0]
    with Lines(out, lambda: now[0]) as lines:
        for k in range(1, 11):
            now[0] += 1.0
            lines.show("loading weights", k, 10)
        lines.show("compiling a", 1, 2)
    assert out.getvalue().splitlines() == [
        "serac: loading weights (1 of 10)",
        "serac: loading weights (6 of 10)",
        "serac: loading weights (10 of 10)",
        "serac: compiling a (1 of 2)",
    ]


def test_a_log_hears_of_processes_side_by_side_as_rarely():
    out, now = io.StringIO(), [0.0]
    with Lines(out, lambda: now[0]) as lines:
        for k in range(40):
            now[0] += 0.2
            for process in ("p0/0", "p0/1"):
                lines.show(f"{process} compiling", k, 40)
    assert len(out.getvalue().splitlines()) == 4


def test_a_terminal_gets_a_bar_a_stage():
    out = Terminal()
    with progress(out) as bars:
        assert isinstance(bars, Bars)
        bars.show("loading weights", 1, 2)
        bars.show("compiling a", 1, 2)
        bars.show("compiling b", 2, 2)
    assert "loading weights" in out.getvalue() and "compiling b" in out.getvalue() and "2/2" in out.getvalue()
    assert isinstance(progress(io.StringIO()), Lines)
