"""`serac top`: what a server does now, from the gauges of its admin listener.

    each second:  GetServerInfo, GetLoad -> Moment -> one screen on a terminal, else one JSON line

Rates are differences between two moments, so the first has none. It costs the server three small calls a second.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TextIO

from engine.clock import Clock
from engine.core.handoff import State
from engine.errors import ConfigError
from engine.replica.loads import block_states
from engine.serve.client import Client

EVERY_S = 1.0
BAR = 32  # letters of a bar
LETTERS = {"held": "#", "writing": "+", "quarantined": "!", "cached": "=", "free": "."}
HOME, REST_OF_LINE, REST = "\x1b[H", "\x1b[K", "\x1b[J"
PASSING = [state.value for state in State if state not in (State.RELEASED, State.ABORTED)]


class LaneNow(NamedTuple):
    """One lane. gauges: empty before its first report."""

    name: str
    role: str
    state: str
    gauges: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Moment:
    """What a server said at `at`."""

    at: float
    title: str
    state: str  # "ready", "draining" or "not ready"
    uptime_s: float
    load: Mapping[str, float]
    lanes: Sequence[LaneNow]

    def per_s(self, name: str, before: "Moment | None") -> float | None:
        """How fast a total grew since `before`; None where that is not known."""
        if before is None or self.at <= before.at:
            return None
        grown = self.load.get(name, 0.0) - before.load.get(name, 0.0)
        return max(grown, 0.0) / (self.at - before.at)  # a total of lanes falls when one of them is lost


def connect(server: str, token_file: Path | None, tls_ca: Path | None) -> Client:
    """A client of the admin listener at `server`."""
    try:
        token = token_file.read_text().split()[0] if token_file else None
        return Client(server, admin=server, token=token, tls_ca=tls_ca.read_bytes() if tls_ca else None)
    except (OSError, IndexError) as error:
        field = "token_file" if token_file else "tls_ca"
        raise ConfigError(f"{field}: cannot be read: {error}", field=field) from None


def run(client: Client, clock: Clock, out: TextIO, once: bool, sleep: Callable[[float], None] = time.sleep) -> int:
    """Show moment after moment until interrupted, or one."""
    before: Moment | None = None
    try:
        while True:
            moment = ask(client, clock)
            show(moment, before, out, once)
            if once:
                return 0
            before = moment
            sleep(EVERY_S)
    except KeyboardInterrupt:
        return 0


def ask(client: Client, clock: Clock) -> Moment:
    """The present moment."""
    info, load = client.info(), client.load()
    lanes = [LaneNow(lane.name, lane.role, lane.state, dict(lane.gauges)) for lane in client.lanes()]
    state = "draining" if info.draining else "ready" if info.ready else "not ready"
    title = f"serac {info.version} {info.model} {info.revision}"
    return Moment(clock.now(), title, state, info.uptime_s, load, lanes)


def show(moment: Moment, before: Moment | None, out: TextIO, once: bool) -> None:
    """One screen on a terminal, else one JSON line."""
    if not out.isatty():
        text = json.dumps(as_object(moment, before)) + "\n"
    elif once:
        text = "\n".join(screen(moment, before)) + "\n"
    else:
        text = HOME + "".join(f"{line}{REST_OF_LINE}\n" for line in screen(moment, before)) + REST
    out.write(text)
    out.flush()


def as_object(moment: Moment, before: Moment | None) -> dict[str, object]:
    """The moment for a program: gauges by name, for all lanes together and for each."""
    return {
        "title": moment.title,
        "state": moment.state,
        "uptime_s": moment.uptime_s,
        "tokens_per_s": moment.per_s("generated_tokens", before),
        "moved_blocks_per_s": moment.per_s("moved_blocks", before),
        **moment.load,
        "per_lane": [
            {"name": lane.name, "role": lane.role, "state": lane.state, **lane.gauges} for lane in moment.lanes
        ],
    }


def screen(moment: Moment, before: Moment | None) -> list[str]:
    """The moment for a person, in lines."""
    load = moment.load
    rows = [("lane", "role", "state", "running", "waiting", "blocks")] + [_row(lane) for lane in moment.lanes]
    widths = [max(len(row[k]) for row in rows) for k in range(5)]
    again = _count(load, "handoffs_asked_again")
    passing = [f"{_count(load, f'handoffs_{state}')} {state}" for state in PASSING]
    return [
        f"{moment.title}  {moment.state}, up {duration(moment.uptime_s)}",
        "",
        f"requests   {_count(load, 'open_requests')} open, {_count(load, 'running')} sequences run, "
        f"{_count(load, 'waiting')} wait",
        f"tokens     {_rate(moment.per_s('generated_tokens', before))}, {_count(load, 'generated_tokens')} in all",
        f"handoffs   {_count(load, 'handoffs_started')} in all, {again} asked again; now {', '.join(passing)}",
        f"moved      {_count(load, 'moved_blocks')} blocks, {_rate(moment.per_s('moved_blocks', before))}",
        f"recovered  {_count(load, 'recoveries')} streams",
        "",
        *(_aligned(row, widths) for row in rows),
        "",
        "blocks: " + ", ".join(f"{letter} {state}" for state, letter in LETTERS.items()),
    ]


def bar(states: Mapping[str, float], width: int = BAR) -> str:
    """`####==....`: the states of LETTERS by their share, in that order; all of `width` where there is a block."""
    total, seen, drawn = sum(states.values()), 0.0, ""
    for state, letter in LETTERS.items():
        seen += states[state]
        drawn += letter * (round(seen / total * width) - len(drawn) if total else 0)
    return drawn


def _row(lane: LaneNow) -> tuple[str, ...]:
    name, load = lane.name.split(".")[0], lane.gauges
    if "blocks" not in load:
        return name, lane.role, lane.state, "", "", ""
    states = block_states(load)
    counts = ", ".join(f"{count:.0f} {state}" for state, count in states.items() if count)
    blocks = f"{bar(states)}  {counts}"
    return name, lane.role, lane.state, _count(load, "running"), _count(load, "waiting"), blocks


def _aligned(row: Sequence[str], widths: Sequence[int]) -> str:
    name, role, state, running, waiting, blocks = row
    cells = [cell.ljust(width) for cell, width in zip((name, role, state), widths, strict=False)]
    return "  ".join([*cells, running.rjust(widths[3]), waiting.rjust(widths[4]), blocks]).rstrip()


def _count(load: Mapping[str, float], name: str) -> str:
    return f"{load.get(name, 0.0):,.0f}"


def _rate(value: float | None) -> str:
    return "- a second" if value is None else f"{value:,.0f} a second"


def duration(seconds: float) -> str:
    """In two units."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
