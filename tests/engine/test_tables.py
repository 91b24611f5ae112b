import io

from engine.tables import readable, show_table


def test_a_table_for_a_program_is_aligned_text():
    out = io.StringIO()
    show_table("title", [{"rows": 1, "us": 3.14159}, {"rows": 4096, "us": 1234.5, "ok": True}], out)
    assert out.getvalue().splitlines() == [
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
