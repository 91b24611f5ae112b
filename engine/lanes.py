"""Which lanes serve a model: from `--lanes` or `--mesh` to a role and a size for each.

    "prefill:tp=2, decode:tp=4"   ->  p0 (prefill, 2 devices), d1 (decode, 4 devices)
    "prefill:tp=1*2, decode:tp=2" ->  p0, p1, d2: a count makes several alike
    "both:tp=8/2"                 ->  b0 (both, 8 devices in two processes), with --workers
    --mesh dp=2,tp=4              ->  b0, b1 (both, 4 devices each)

Lanes take the devices in order, each its own. This is data only: no device is asked.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from engine.core.roles import ROLES, Role
from engine.errors import ConfigError, wrong

FORMS = "ROLE:tp=N, ROLE:tp=N*COUNT or ROLE:tp=N/PROCESSES, comma between them, with roles prefill, decode, both"
ENTRY = re.compile(r"(\w+)\s*:\s*(?:tp\s*=\s*)?(\d{1,4})\s*(?:/\s*(\d{1,4}))?\s*(?:\*\s*(\d{1,3}))?", re.ASCII)
LOCAL = "localhost"


class LaneSpec(NamedTuple):
    """One lane: `tp` devices, over one process an entry of `hosts`."""

    name: str
    role: Role
    tp: int
    hosts: tuple[str, ...] = (LOCAL,)

    def __str__(self) -> str:
        return f"{self.name} {self.role}:tp={self.tp}" + f"/{len(self.hosts)}" * (len(self.hosts) > 1)


def parse_lanes(text: str) -> tuple[LaneSpec, ...]:
    """The lanes that `text` names. Raises ConfigError with the valid forms."""
    lanes: list[LaneSpec] = []
    for item in text.split(","):
        match = ENTRY.fullmatch(item.strip())
        role = next((role for role in ROLES if match is not None and match[1] == role), None)
        if match is None or role is None:
            raise ConfigError(wrong("lanes", item.strip(), FORMS), field="lanes")
        tp, processes, count = int(match[2]), int(match[3] or 1), int(match[4] or 1)
        if min(tp, processes, count) < 1 or tp % processes:
            raise ConfigError(wrong("lanes", item.strip(), FORMS), field="lanes")
        for _ in range(count):
            lanes.append(LaneSpec(f"{role[0]}{len(lanes)}", role, tp, (LOCAL,) * processes))
    if all(lane.role == "prefill" for lane in lanes):
        raise ConfigError("lanes: got prefill lanes only; expected at least one of decode or both", field="lanes")
    if all(lane.role == "decode" for lane in lanes):
        raise ConfigError("lanes: got decode lanes only; expected at least one of prefill or both", field="lanes")
    return tuple(lanes)


def alike(count: int, tp: int) -> tuple[LaneSpec, ...]:
    """`count` lanes that do everything."""
    return tuple(LaneSpec(f"b{index}", "both", tp) for index in range(count))


def move(lanes: Sequence[LaneSpec]) -> bool:
    """Whether KV moves between these lanes."""
    return len(lanes) > 1 and any(lane.role == "prefill" for lane in lanes)


def spoken(lanes: Sequence[LaneSpec]) -> str:
    """`p0 prefill on 1 device, d1 decode on 2 devices`, for a person."""
    return ", ".join(
        f"{lane.name} {lane.role} on {lane.tp} device{'s' * (lane.tp > 1)}"
        + f" in {len(lane.hosts)} processes" * (len(lane.hosts) > 1)
        for lane in lanes
    )


def device_count(text: str) -> int:
    """Devices that the lanes of `text` take; 1 for what is no list of lanes, which is refused later, by name."""
    try:
        return sum(lane.tp for lane in parse_lanes(text))
    except ConfigError:
        return 1
