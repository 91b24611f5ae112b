"""A table of facts for a person: rich where there is a terminal, aligned columns where there is none.

title
  rows  step us  schedule
    64     21.4       8.2
"""

from collections.abc import Mapping, Sequence
from typing import TextIO

from rich.console import Console
from rich.table import Table

GAP = "  "


def show_table(title: str, rows: Sequence[Mapping[str, object]], out: TextIO) -> None:
    """Write `rows` to `out`; the columns are the keys of all rows, in the order in which they first appear."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[readable(row.get(name)) for name in columns] for row in rows]
    right = [all(_numeric(row.get(name)) for row in rows) for name in columns]
    if out.isatty():
        table = Table(title=title, title_justify="left")
        for name, is_right in zip(columns, right, strict=True):
            table.add_column(name, justify="right" if is_right else "left")
        for line in cells:
            table.add_row(*line)
        Console(file=out).print(table)
        return
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    lines = [_line(line, widths, right) for line in (columns, *cells)]
    print("\n".join([title, *lines]), file=out, flush=True)


def readable(value: object) -> str:
    """One cell: numbers with three or more digits that matter, whole ones in groups, nothing for None."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {readable(part)}" for name, part in value.items())
    return str(value)


def _numeric(value: object) -> bool:
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))


def _line(cells: Sequence[str], widths: Sequence[int], right: Sequence[bool]) -> str:
    padded = [
        cell.rjust(width) if is_right else cell.ljust(width)
        for cell, width, is_right in zip(cells, widths, right, strict=True)
    ]
    return (GAP + GAP.join(padded)).rstrip()
