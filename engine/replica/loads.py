"""Gauges of a replica and of each of its lanes, from what the lanes report.

    Load of each lane --gauges--> {name: number} --totals--> the same names, summed

A lane whose process is being started, or was given up, has a state and no gauges; one that drains takes nothing
new, and is started again soon.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from engine.core.handoff import State
from engine.core.messages import Load
from engine.core.roles import Role

READY, STARTING, DRAINING, GIVEN_UP = "ready", "starting", "draining", "given up"
FIELDS = {  # of a lane's report, by the name of their gauge
    "rows": "rows",
    "running": "running",
    "waiting": "waiting",
    "in_flight_steps": "flights",
    "queued_tokens": "queued_tokens",
    "blocks": "blocks",
    "blocks_available": "available",
    "blocks_cached": "cached",
    "blocks_writing": "writing",
    "blocks_quarantined": "quarantined",
    "preemptions": "preemptions",
    "prompt_tokens": "prompt_tokens",
    "cached_tokens": "cached_tokens",
    "steps": "steps",
    "moved_blocks": "moved_blocks",
    "handoffs_asked_again": "asked_again",
}
HANDOFFS = {f"handoffs_{state.value}": state.value for state in State}


class ProcessNow(NamedTuple):
    """One process of a lane. state: "awaited", "starting" with its stage and how far that is, or "ready"."""

    rank: int
    host: str
    state: str
    stage: str = ""
    done: int = 0
    of: int = 0


class Standing(NamedTuple):
    """What whoever keeps a lane's processes knows of them; empty where the lane is in this process.

    since_s  for how long its present life has lasted
    problem  why the last one ended, if it did by itself
    """

    processes: tuple[ProcessNow, ...] = ()
    restarts: int = 0
    since_s: float = 0.0
    problem: str = ""


class LaneLoad(NamedTuple):
    """One lane. gauges: empty before its first report."""

    name: str
    role: Role
    state: str = READY
    gauges: Mapping[str, float] = {}
    standing: Standing = Standing()


def gauges(load: Load) -> dict[str, float]:
    """What one lane reports, by name."""
    states = dict(load.handoffs)
    named = {name: float(getattr(load, of)) for name, of in FIELDS.items()}
    return named | {name: float(states.get(state, 0)) for name, state in HANDOFFS.items()}


def totals(lanes: Iterable[LaneLoad]) -> dict[str, float]:
    """The sum over lanes, each name there even where no lane is."""
    summed = Counter[str]()
    for lane in lanes:
        summed.update(lane.gauges)
    return {name: float(summed[name]) for name in (*FIELDS, *HANDOFFS)}


def block_states(load: Mapping[str, float]) -> dict[str, float]:
    """Blocks by what they are for; they add up to all of them."""
    held = load["blocks"] - load["blocks_available"] - load["blocks_writing"]
    return {
        "held": held,
        "cached": load["blocks_cached"],
        "quarantined": load["blocks_quarantined"],
        "writing": load["blocks_writing"] - load["blocks_quarantined"],
        "free": load["blocks_available"] - load["blocks_cached"],
    }
