"""`serac status`: what runs where. Hosts, lanes, the processes of each, and what each of them does.

    GetServerInfo, GetLoad -> for a person lines, one a process; off a terminal, or with --json, one object

    lane  role     state     running  waiting  restarts  up          rank  host  process
    d1    decode   ready           2        0         1  1 h 12 min     0  h0    ready
                                                                        1  h1    ready

It costs the server three small calls.
"""

import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TextIO

from engine.serve.client import Client
from engine.serve.proto.serac.v1 import control_pb2 as pb
from engine.top import duration

READY = "ready"
LANE = ("lane", "role", "state", "running", "waiting", "restarts", "up")
COLUMNS = (*LANE, "rank", "host", "process")
NUMBERS = ("running", "waiting", "restarts", "rank")


class Seen(NamedTuple):
    """What a server says."""

    info: pb.GetServerInfoResponse
    load: Mapping[str, float]
    lanes: Sequence[pb.LaneLoad]

    @property
    def state(self) -> str:
        return "draining" if self.info.draining else READY if self.info.ready else "not ready"

    @property
    def whole(self) -> bool:
        """Whether it serves, on every lane."""
        return self.state == READY and all(lane.state == READY for lane in self.lanes)


def run(client: Client, as_json: bool, out: TextIO) -> int:
    """Show it; 0 where every lane is ready, else 1."""
    seen = Seen(client.info(), client.load(), client.lanes())
    if as_json or not out.isatty():
        print(json.dumps(as_object(seen)), file=out)
    else:
        print("\n".join(screen(seen)), file=out)
    return 0 if seen.whole else 1


def screen(seen: Seen) -> list[str]:
    """For a person, in lines; last why lanes that are not ready were lost."""
    info, ready = seen.info, sum(lane.state == READY for lane in seen.lanes)
    hosts = len(by_host(seen.lanes))
    over = f" on {hosts} host{'s' * (hosts > 1)}" if hosts else ""
    table = [dict(zip(COLUMNS, COLUMNS, strict=True))] + [row for lane in seen.lanes for row in rows(lane)]
    widths = {name: max(len(row[name]) for row in table) for name in COLUMNS}
    lost = [f"{slot(lane)}: {lane.problem}" for lane in seen.lanes if lane.problem and lane.state != READY]
    return [
        f"serac {info.version} {info.model} {info.revision}  {seen.state}, up {duration(info.uptime_s)}",
        f"{ready} of {len(seen.lanes)} lanes ready{over}, {seen.load.get('open_requests', 0):.0f} requests open",
        "",
        *(aligned(row, widths) for row in table),
        *(["", *lost] if lost else []),
    ]


def rows(lane: pb.LaneLoad) -> list[dict[str, str]]:
    """One a process, or one without any; what holds for the lane stands in the first."""
    counts = [f"{lane.gauges[name]:.0f}" if name in lane.gauges else "" for name in ("running", "waiting")]
    up = duration(lane.since_s) if lane.processes else ""
    first = dict(zip(LANE, (slot(lane), lane.role, lane.state, *counts, str(lane.restarts), up), strict=True))
    found = []
    for process in lane.processes or [None]:
        found.append(dict.fromkeys(COLUMNS, "") | first | of_process(process))
        first = {}
    return found


def of_process(process: pb.LaneProcess | None) -> dict[str, str]:
    """The columns of a process."""
    if process is None:
        return {}
    stage = f": {process.stage} {process.done} of {process.of}" if process.stage else ""
    return {"rank": str(process.rank), "host": process.host, "process": f"{process.state}{stage}"}


def aligned(row: Mapping[str, str], widths: Mapping[str, int]) -> str:
    """Numbers to the right."""
    cells = [
        text.rjust(widths[name]) if name in NUMBERS else text.ljust(widths[name]) for name, text in row.items()
    ]
    return "  ".join(cells).rstrip()


def as_object(seen: Seen) -> dict[str, object]:
    """The same for a program."""
    info = seen.info
    return {
        "version": info.version,
        "model": info.model,
        "revision": info.revision,
        "state": seen.state,
        "whole": seen.whole,
        "uptime_s": info.uptime_s,
        "open_requests": seen.load.get("open_requests", 0.0),
        "hosts": [{"name": name, "processes": processes} for name, processes in by_host(seen.lanes).items()],
        "lanes": [lane_object(lane) for lane in seen.lanes],
    }


def lane_object(lane: pb.LaneLoad) -> dict[str, object]:
    """One lane for a program."""
    fields = ("rank", "host", "state", "stage", "done", "of")
    return {
        "lane": slot(lane),
        "life": lane.name,
        "role": lane.role,
        "state": lane.state,
        "restarts": lane.restarts,
        "since_s": lane.since_s,
        "problem": lane.problem,
        "processes": [{name: getattr(process, name) for name in fields} for process in lane.processes],
        "gauges": dict(lane.gauges),
    }


def by_host(lanes: Sequence[pb.LaneLoad]) -> dict[str, list[str]]:
    """The processes of each host, as lane/rank."""
    found: dict[str, list[str]] = {}
    for lane in lanes:
        for process in lane.processes:
            found.setdefault(process.host, []).append(f"{slot(lane)}/{process.rank}")
    return dict(sorted(found.items()))


def slot(lane: pb.LaneLoad) -> str:
    """Its name over all of its lives."""
    return lane.name.split(".")[0]
