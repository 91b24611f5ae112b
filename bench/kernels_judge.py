"""What the rows of `bench kernels` say: shares of the ceilings, goals and gaps, the tables, what is wrong.

    decode    bytes a second over those of a copy (and over those of reading, which is the true limit)
    prefill   products a second over those of a large product
    gap       how far the share is from what has to ship: 0.1 is a tenth above, -0.1 a tenth below

Beside each row stands the fastest library call of the same case in the same run. Figures in, figures out.
"""

import re
from collections.abc import Mapping, Sequence

from bench.kernels_cases import CHOSEN, RATIOS, Case, Ratio, cases, goal, small_cases
from bench.kernels_process import Row
from bench.kernels_speed import label

LIBRARIES = ("library", "torch")
TIMED = ("speed", *LIBRARIES)


def judged(rows: Sequence[Row]) -> list[Row]:
    """The rows, those of cases with their shares, goals and the library beside them."""
    known = {label(case): case for case in [*small_cases(), *cases()]}
    best: dict[tuple, Row] = {}
    for row in rows:
        at = row.get("case"), row.get("context")
        if row["part"] in LIBRARIES and "us" in row and row["us"] < best.get(at, {"us": float("inf")})["us"]:
            best[at] = row
    ceilings = {row["case"]: row for row in rows if row["part"] == "ceilings" and "us" in row}
    found = []
    for row in rows:
        row = dict(row)
        if row["part"] in TIMED and "us" in row:
            row |= shares(row, ceilings)
            row |= held_to(known[row["case"]], row)
            beside = best.get((row["case"], row["context"]))
            if row["part"] == "speed" and beside is not None:
                row |= {"library": beside["by"], "library us": beside["us"], "x library": beside["us"] / row["us"]}
        found.append(row)
    return found


def shares(row: Row, ceilings: Mapping[str, Row]) -> Row:
    """Of what was measured as the most in the same run."""
    if "flops" in row:
        top = ceilings.get("matmul")
        return {} if top is None else {"share": row["TFLOP/s"] / top["TFLOP/s"]}
    found = {}
    for name, words in (("copy", "share"), ("read", "of reading")):
        if name in ceilings:
            found[words] = row["GB/s"] / ceilings[name]["GB/s"]
    return found


def held_to(case: Case, row: Row) -> Row:
    """The goals of a case and how the share stands to them."""
    wanted = goal(case, row["context"], row["bytes"])
    if wanted is None or "share" not in row:
        return {}
    share = row["share"]
    return {**wanted._asdict(), "reaches": wanted.met(share), "gap": share / wanted.ship - 1}


def ratios(rows: Sequence[Row]) -> list[Row]:
    """Speeds of one case over another of the same run."""
    timed = [row for row in rows if row["part"] == "speed" and "us" in row]
    speeds = {(row["case"], row["by"], row["context"]): row for row in timed}
    found = []
    for ratio in RATIOS:
        for (case, by, context), row in speeds.items():
            if match := re.fullmatch(ratio.case, case):
                other = speeds.get((match.expand(ratio.beside), by, context))
                if other is not None and other is not row:
                    found.append(_beside(ratio, row, other))
    return found


def _beside(ratio: Ratio, row: Row, other: Row) -> Row:
    found = other["us"] / row["us"]
    line = {"part": "ratio", "case": row["case"], "by": row["by"], "piece": row["piece"], "context": row["context"]}
    line |= {"what": ratio.words, "speed over": other["case"], "ratio": found}
    if other["bytes"] >= ratio.from_bytes:
        line |= {"ship": ratio.ship, "reaches": "ship" if found >= ratio.ship else "none"}
    return line


def missed(rows: Sequence[Row], small: bool) -> list[str]:
    """What is wrong, in words: failed checks, errors of ours, and goals that the chosen kernels have to ship."""
    wrong = []
    for row in rows:
        words = " ".join(str(row[name]) for name in ("part", "case", "context", "by", "piece") if row.get(name))
        if "error" in row and row["part"] not in LIBRARIES:
            wrong.append(f"{words}: {row['error']}")
        elif row.get("failed"):
            wrong.append(f"{words}: {row['failed']}")
        elif row.get("loads") == "no":
            wrong.append(f"{words}: {row['reason']}")
        elif not small and row.get("piece") == CHOSEN and row.get("reaches") == "none":
            wrong.append(f"{words}: {row.get('share', row.get('ratio')):.3f}, has to ship {row['ship']:.3f}")
    return wrong


COLUMNS = {
    "ceilings": ("case", "us", "GB/s", "TFLOP/s"),
    "check": ("case", "piece", "by", "error_max", "mass_error_max", "judged", "failed"),
    "decode": (
        *(
            "case",
            "context",
            "by",
            "us",
            "GB/s",
            "share",
            "of reading",
            "ship",
            "best",
            "moonshot",
            "reaches",
            "gap",
        ),
        *("library", "x library"),
    ),
    "prefill": (
        *("case", "by", "us", "TFLOP/s", "share", "ship", "best", "moonshot", "reaches", "gap"),
        *("library", "x library"),
    ),
    "ratio": ("what", "case", "context", "by", "ratio", "ship", "reaches"),
    "step": (
        "batch",
        "by",
        "piece",
        "us",
        "launches",
        "command buffers",
        "launches in them",
        "kernel calls",
        "temp_bytes",
    ),
    "loads": ("case", "loads", "bytes", "reason"),
    "sanitize": ("case", "by", "piece", "errors", "failed"),
    "not measured": ("part", "case", "by", "piece", "skipped", "error"),
}
TITLES = {
    "ceilings": "what this device can do",
    "check": "beside float64, with NaN where nothing was written",
    "decode": "decode: shares of a copy's bytes a second",
    "prefill": "prefill: shares of a large product's",
    "ratio": "speeds beside one another",
    "step": "a whole decode step",
    "loads": "executables written where no GPU is seen",
    "sanitize": "compute-sanitizer",
    "not measured": "what was not measured, and why",
}


def tables(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """Titles and lines; a row that has no figures stands in the last."""
    sorted_rows: dict[str, list[Row]] = {name: [] for name in COLUMNS}
    for row in rows:
        name = row["part"]
        if "skipped" in row or "error" in row:
            name = "not measured"
        elif name in TIMED:
            name = str(row["case"]).partition(" ")[0]
        sorted_rows[name].append({column: row[column] for column in COLUMNS[name] if column in row})
    return [(f"\n{TITLES[name]}", lines) for name, lines in sorted_rows.items() if lines]
