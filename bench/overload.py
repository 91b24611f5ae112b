"""What a server does when it is asked for more than it can: goodput over capacity, waits, refusals, queues.

    capacity: clients that always have one request more        simulated cluster in virtual time, without faults
    x times of it: arrivals by chance, whatever is answered    the embedded model, in this process

Goodput counts requests whose first token came in time and that ended whole. In time is what the server is told as
--max-wait; nothing else of the client's aim is known to it. A capacity is measured before and after the others
and their mean counts, since other work on the machine shows in all real figures.
"""

import argparse
import os
from collections.abc import Sequence

import jax

from bench.overload_real import Crowd, embedded
from bench.record import parser, record, show
from engine.core.roles import Role
from engine.environment import needed
from engine.lanes import parse_lanes
from engine.sim.overload import JOIN_S, capacity, overload

Row = dict[str, object]
AIMS = {2.0: 0.95, 10.0: 0.90}
SIMULATED: tuple[tuple[Role, ...], ...] = (("both",), ("prefill", "decode"))
REAL = ("both:tp=1", "prefill:tp=1, decode:tp=1")


def main(arguments: list[str]) -> int:
    """Measure every multiple of the capacity on every layout of lanes."""
    options = parser("overload", __doc__)
    options.add_argument("--x", default="1,2,10", help="multiples of the capacity (default 1,2,10)")
    options.add_argument("--seconds", type=float, default=300.0, help="virtual, a run; 0: none (default 300)")
    options.add_argument(
        "--in-time", type=float, default=2.0, help="seconds to a first token, simulated (default 2)"
    )
    options.add_argument("--real-seconds", type=float, default=20.0, help="a run; 0: none (default 20)")
    options.add_argument(
        "--real-in-time", type=float, default=4.0, help="seconds to a first token, real (default 4)"
    )
    options.add_argument("--rows", type=int, default=4, help="rows of a real lane (default 4)")
    options.add_argument("--seed", type=int, default=0)
    chosen = options.parse_args(arguments)
    times = [float(x) for x in chosen.x.split(",")]
    rows: list[Row] = []
    if chosen.seconds > 0:
        rows += [row for roles in SIMULATED for row in simulated(roles, times, chosen)]
        show(f"simulated, a first token within {chosen.in_time:g} s", rows)
        record("overload", arguments, "computed").append(rows, chosen.out)
    if chosen.real_seconds > 0:
        jax.config.update("jax_platforms", "cpu")
        os.environ.update(needed("cpu", REAL[-1], os.environ))
        rows = [row for lanes in REAL for row in real(lanes, times, chosen)]
        show(f"\nembedded model, a first token within {chosen.real_in_time:g} s", rows)
        record("overload", arguments).append(rows, chosen.out)
    return 0


def simulated(roles: tuple[Role, ...], times: Sequence[float], chosen: argparse.Namespace) -> list[Row]:
    """The rows of one simulated layout."""
    able, rows = capacity(roles, chosen.seconds, chosen.seed), []
    for x in times:
        seen = overload(roles, x * able, chosen.seconds, chosen.in_time, chosen.seed)
        good = seen.good(JOIN_S, JOIN_S + chosen.seconds, chosen.in_time)
        rows.append(
            {
                **_row(" ".join(roles), x, able, good, list(seen.waits.values()), seen.asked),
                "refused": len(seen.refused) / seen.asked,
                "hint p50 s": _part([told.retry_s for told in seen.refused], 0.5),
                "most waiting": seen.longest_queue,
                "most tokens waiting": seen.longest_queue_tokens,
            }
        )
    return rows


def real(lanes: str, times: Sequence[float], chosen: argparse.Namespace) -> list[Row]:
    """The rows of one layout of real lanes."""
    crowd = Crowd(embedded(lanes, chosen.rows), chosen.rows, chosen.seed)
    rows: list[Row] = []
    try:
        crowd.closed(chosen.real_seconds / 4)  # the first steps of a process are slow
        before = crowd.closed(chosen.real_seconds)
        runs = [crowd.open(x * before, chosen.real_seconds, chosen.real_in_time) for x in times]
        after = crowd.closed(chosen.real_seconds)
    finally:
        crowd.stop()
    for x, seen in zip(times, runs, strict=True):
        rows.append(
            {
                **_row(_spoken(lanes), x, (before + after) / 2, seen.goodput, seen.waits, seen.asked),
                "refused": len(seen.refusals) / seen.asked,
                "hint p50 s": _part([hint for _, hint in seen.refusals], 0.5),
                "refusal p50 ms": _part([took * 1e3 for took, _ in seen.refusals], 0.5),
                "refusal p99 ms": _part([took * 1e3 for took, _ in seen.refusals], 0.99),
                "most waiting": seen.longest_queue,
                "RSS MB": seen.before_bytes / 1e6,
                "RSS grew": seen.after_bytes / seen.before_bytes - 1,
                "capacity before": before,
                "capacity after": after,
            }
        )
    return rows


def _row(lanes: str, x: float, able: float, good: float, waits: list[float], asked: int) -> Row:
    """What both kinds say alike."""
    return {
        "lanes": lanes,
        "x": x,
        "capacity/s": able,
        "goodput": good / able,
        "aim": AIMS.get(x),
        "wait p50 s": _part(waits, 0.5),
        "wait p99 s": _part(waits, 0.99),
        "asked": asked,
    }


def _part(values: Sequence[float], share: float) -> float | None:
    """The value that this share of `values` does not exceed."""
    return sorted(values)[min(int(share * len(values)), len(values) - 1)] if values else None


def _spoken(lanes: str) -> str:
    return " ".join(lane.role for lane in parse_lanes(lanes))
