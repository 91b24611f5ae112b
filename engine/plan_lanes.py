"""The text of `serac plan --lanes`: what each lane takes, and what a handoff between them moves.

    "prefill:tp=1, decode:tp=2" -> lanes --planning, one size each--> Plans --> one table, or one JSON object

Lanes of one size are planned once. `serac plan --mesh tp=N` says everything of a lane of N devices.
"""

import json
from collections.abc import Mapping, Sequence
from typing import TextIO

from engine.banner import size
from engine.config import Settings
from engine.errors import ConfigError
from engine.lanes import LaneSpec, move, parse_lanes
from engine.models.config import ModelConfig, from_hf
from engine.plan_report import Planned, as_object, model_at
from engine.planning import Plan, decide, device_named, estimate
from engine.tables import show_table
from engine.weights.tensors import choose_dtype
from sharding.mesh import MeshSpec


def run(settings: Settings, device: str, memory_bytes: int | None, as_json: bool, out: TextIO) -> int:
    """Plan each lane and show it; 0 where all of them fit their devices, else 1.

    device, memory_bytes  as for plan_report.run
    Raises ConfigError, ModelError or NotFound, naming what to change.
    """
    if settings.mesh != "auto":
        raise ConfigError("lanes: got --mesh as well; expected one of the two", field="lanes")
    lanes = parse_lanes(settings.lanes or "")
    model = model_at(settings.model)
    config = from_hf(model.config)
    there = device_named(device)
    if memory_bytes is not None:
        there = there._replace(memory_bytes=memory_bytes)
    stated = choose_dtype("auto", model.config)
    plans: dict[int, Plan] = {}
    for lane in lanes:
        try:
            spec = MeshSpec(tp=lane.tp)
            plans[lane.tp] = estimate(config, spec, there, decide(settings, config, spec, there, stated))
        except ValueError as error:
            raise ConfigError(f"lane {lane.name}: {error}", field="lanes") from error
    pairs = [(lane, plans[lane.tp]) for lane in lanes]
    if as_json:
        print(json.dumps(lanes_as_object(pairs, model, config), default=str), file=out, flush=True)
    else:
        show_lanes(pairs, model, config, out)
    return 0 if all(plan.fits for _, plan in pairs) else 1


def lanes_as_object(
    pairs: Sequence[tuple[LaneSpec, Plan]], model: Planned, config: ModelConfig
) -> dict[str, object]:
    """The lanes for a program; bytes are those of one device of the lane."""
    lanes = [
        {"lane": lane.name, "role": lane.role, **as_object(plan, model, config), "devices": lane.tp}
        for lane, plan in pairs
    ]
    return {
        "model": model.name,
        "revision": model.revision,
        "devices": sum(lane.tp for lane, _ in pairs),
        "fits": all(plan.fits for _, plan in pairs),
        "moved_bytes_per_block": moved_bytes(pairs),
        "lanes": lanes,
    }


def moved_bytes(pairs: Sequence[tuple[LaneSpec, Plan]]) -> int:
    """KV bytes of a block, every head once; 0 where no lane hands prompts on."""
    if not move([lane for lane, _ in pairs]):
        return 0
    plan = pairs[0][1]
    return plan.block_bytes * plan.kv_ways


def show_lanes(pairs: Sequence[tuple[LaneSpec, Plan]], model: Planned, config: ModelConfig, out: TextIO) -> None:
    """The lanes for a person."""
    choice = pairs[0][1].choice
    weights = "no weights here" if model.revision is None else f"revision {model.revision}"
    count, devices = len(pairs), sum(lane.tp for lane, _ in pairs)
    on = f"{count} lane{'s' * (count > 1)}, {devices} device{'s' * (devices > 1)} together"
    title = f"{model.name} ({config.architecture}, {weights}) on {on}"
    print(f"{title}, {choice.dtype}, numerics {choice.numerics}\n", file=out)
    show_table("bytes of one device of each lane", [_memory(lane, plan) for lane, plan in pairs], out)
    show_table("\nwhat fits in each lane", [_room(lane, plan) for lane, plan in pairs], out)
    if moved := moved_bytes(pairs):
        block = choice.sizes.block_size
        print(f"\na handoff moves {moved:,} bytes a block of {block} tokens, every kv head once", file=out)
    for lane, plan in pairs:
        if not plan.fits:
            print(
                f"\nlane {lane.name} DOES NOT FIT: {size(plan.total_bytes)} of {size(plan.device.memory_bytes)}",
                file=out,
            )


def _memory(lane: LaneSpec, plan: Plan) -> Mapping[str, object]:
    memory = plan.device.memory_bytes
    return {
        "lane": lane.name,
        "role": lane.role,
        "devices": lane.tp,
        "weights": size(plan.weights_bytes),
        "KV pool": size(plan.kv_bytes),
        "state": size(plan.state_bytes),
        "temporaries, estimate": size(plan.temporary_bytes),
        "together": size(plan.total_bytes),
        "of the device": f"{plan.total_bytes / memory:.1%}" if memory else None,
    }


def _room(lane: LaneSpec, plan: Plan) -> Mapping[str, object]:
    sizes = plan.choice.sizes
    return {
        "lane": lane.name,
        "blocks": sizes.num_blocks,
        "tokens": plan.tokens,
        "longest sequence": sizes.max_length,
        "of them at once": plan.whole_sequences,
        "sequences at once": sizes.max_rows,
        "tokens a step": plan.choice.max_tokens,
    }
