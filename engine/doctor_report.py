"""What `serac doctor` prints: a line a check as it is known, then the table of the all-reduce.

    ok    h0   python     3.11
    fail  h1   interface  no interface has its address; correct address in its [[host]]

With --json one object at the end: findings, allreduce, exit.
"""

import json
from collections.abc import Sequence
from typing import TextIO

from engine.cluster import doctor
from engine.cluster.asked import Asked
from engine.cluster.checks import Finding
from engine.tables import show_table

SIZES = ("B", "KiB", "MiB", "GiB")


def run(asked: Asked, as_json: bool, out: TextIO) -> int:
    """Look, print; the exit code."""
    found: list[Finding] = []
    width = max(len(name) for name in (asked.front, *(host.name for host in asked.hosts)))

    def tell(findings: Sequence[Finding]) -> None:
        found.extend(findings)
        for each in () if as_json else findings:
            print(line(each, width), file=out, flush=True)

    code, rows = doctor.run(asked, tell)
    if as_json:
        listed = [{name: value for name, value in each._asdict().items() if name != "code"} for each in found]
        print(json.dumps({"findings": listed, "allreduce": rows, "exit": code}), file=out, flush=True)
        return code
    if rows:
        show_table("all-reduce", [{**row, "bytes": size(int(str(row["bytes"])))} for row in rows], out)
    counts = {level: sum(each.level == level for each in found) for level in ("ok", "warn", "fail")}
    print(f"{counts['ok']} ok, {counts['warn']} to heed, {counts['fail']} failed", file=out, flush=True)
    return code


def line(finding: Finding, width: int) -> str:
    """One finding, and what to do where it is not ok."""
    todo = f"; {finding.todo}" if finding.todo else ""
    return f"{finding.level:<4}  {finding.host:<{width}}  {finding.what:<9}  {finding.words}{todo}"


def size(count: int) -> str:
    """A power of two for a person."""
    unit = 0
    while count >= 1024:
        count, unit = count // 1024, unit + 1
    return f"{count} {SIZES[unit]}"
