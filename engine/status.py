"""`serac status`: what runs where. Hosts, lanes, the processes of each, and what each of them does.

    GetServerInfo, GetLoad -> one table for a person, a row a process; off a terminal, or with --json, one object

It costs the server two small calls.
"""

import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TextIO

from engine.serve.client import Client
from engine.serve.proto.serac.v1 import control_pb2 as pb
from engine.tables import show_table
from engine.top import duration

READY = "ready"


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
        show_table(title(seen), rows(seen.lanes), out)
        for lane in (lane for lane in seen.lanes if lane.problem and lane.state != READY):
            print(f"{slot(lane)}: {lane.problem}", file=out)
    return 0 if seen.whole else 1


def title(seen: Seen) -> str:
    """The server in a line."""
    info, ready = seen.info, sum(lane.state == READY for lane in seen.lanes)
    hosts = len(by_host(seen.lanes))
    over = f" on {hosts} host{'s' * (hosts > 1)}" if hosts else ""
    return (
        f"serac {info.version} {info.model} {info.revision:.12}: {seen.state} for {duration(info.uptime_s)}, "
        f"{ready} of {len(seen.lanes)} lanes ready{over}, {seen.load.get('open_requests', 0):.0f} requests open"
    )


def rows(lanes: Sequence[pb.LaneLoad]) -> list[dict[str, object]]:
    """One a process, or one a lane without any of its own; what holds for a lane stands in its first."""
    found = []
    for lane in lanes:
        shared = {
            "lane": slot(lane),
            "role": lane.role,
            "state": lane.state,
            "running": count(lane, "running"),
            "waiting": count(lane, "waiting"),
            "blocks free": count(lane, "blocks_available"),
            "restarts": lane.restarts,
            "up": duration(lane.since_s) if lane.processes else "",
        }
        for process in lane.processes or [None]:
            found.append({**shared, **of_process(process)})
            shared = dict.fromkeys(shared, None)
    return found


def of_process(process: pb.LaneProcess | None) -> dict[str, object]:
    """The columns of a process."""
    if process is None:
        return {}
    stage = f": {process.stage} {process.done} of {process.of}" if process.stage else ""
    return {"rank": process.rank, "host": process.host, "process": f"{process.state}{stage}"}


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


def count(lane: pb.LaneLoad, name: str) -> int | None:
    """A gauge, none before the first report."""
    return int(lane.gauges[name]) if name in lane.gauges else None
