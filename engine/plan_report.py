"""The text of `serac plan`: what a model takes on a mesh that may not be here yet.

    MODEL --model_at--> config.json + settings + a named device --planning--> Plan --> tables, or one JSON object

Only config.json is read, so a folder that holds nothing else can be planned for; no device is asked.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, TextIO

from engine.banner import size
from engine.config import Settings
from engine.errors import ConfigError
from engine.models.config import ModelConfig, from_hf
from engine.planning import Plan, Step, decide, device_named, estimate
from engine.tables import show_table
from engine.weights.artifact import is_artifact
from engine.weights.files import read_json
from engine.weights.source import CONFIG, resolve
from engine.weights.tensors import choose_dtype
from sharding.mesh import MeshSpec, parse_mesh

OPTIONS = (  # of config.Settings, that a plan depends on
    "mesh",
    "dtype",
    "max_model_len",
    "kv_memory",
    "block_size",
    "max_num_seqs",
    "max_num_batched_tokens",
    "numerics",
)


class Planned(NamedTuple):
    """A model that may have no weights here."""

    name: str
    revision: str | None
    config: Mapping[str, object]


def model_at(model: str) -> Planned:
    """What `model` names: as for a server, or a folder with a config.json alone, or that file."""
    path = Path(model).expanduser()
    lone = path if path.name == CONFIG else path / CONFIG
    if lone.is_file() and (lone == path or not (is_artifact(path) or any(path.glob("*.safetensors*")))):
        return Planned(lone.resolve().parent.name, None, read_json(lone, lone.resolve().parent))
    folder = resolve(model)
    return Planned(folder.name, folder.short_revision, folder.config())


def run(settings: Settings, device: str, memory_bytes: int | None, as_json: bool, out: TextIO) -> int:
    """Plan and show it; 0 where all of it fits the device, else 1.

    device        a name of planning.DEVICES
    memory_bytes  of each device, instead of what is known of the name
    Raises ConfigError, ModelError or NotFound, naming what to change.
    """
    model = model_at(settings.model)
    config = from_hf(model.config)
    there = device_named(device)
    if memory_bytes is not None:
        there = there._replace(memory_bytes=memory_bytes)
    try:
        spec = parse_mesh(settings.mesh) if settings.mesh != "auto" else MeshSpec()
        stated = choose_dtype("auto", model.config)
        plan = estimate(config, spec, there, decide(settings, config, spec, there, stated))
    except ValueError as error:
        raise ConfigError(str(error), field="mesh") from error
    if as_json:
        print(json.dumps(as_object(plan, model, config), default=str), file=out, flush=True)
    else:
        show(plan, model, config, out)
    return 0 if plan.fits else 1


def as_object(plan: Plan, model: Planned, config: ModelConfig) -> dict[str, object]:
    """The plan for a program; bytes are those of one device."""
    sizes = plan.choice.sizes
    return {
        "model": model.name,
        "revision": model.revision,
        "architecture": config.architecture,
        "mesh": str(plan.spec),
        "devices": plan.spec.size,
        "platform": plan.device.platform,
        "dtype": str(plan.choice.dtype),
        "numerics": plan.choice.numerics,
        "context": sizes.max_length,
        "block_size": sizes.block_size,
        "num_blocks": sizes.num_blocks,
        "max_num_seqs": sizes.max_rows,
        "max_num_batched_tokens": plan.choice.max_tokens,
        "memory_bytes": plan.device.memory_bytes,
        "weights_bytes": plan.weights_bytes,
        "kv_bytes": plan.kv_bytes,
        "state_bytes": plan.state_bytes,
        "temporary_bytes_estimate": plan.temporary_bytes,
        "fits": plan.fits,
        "checkpoint_bytes": plan.checkpoint_bytes,
        "padding_bytes": dict(plan.padding),
        "kv_copies": plan.kv_copies,
        "block_bytes": plan.block_bytes,
        "kv_tokens": plan.tokens,
        "whole_sequences": plan.whole_sequences,
        "weights_read_s": plan.read_s,
        "load_programs": plan.loads,
        "steps": [{**_step(step), "collectives": _sent(plan, step)} for step in plan.steps],
    }


def show(plan: Plan, model: Planned, config: ModelConfig, out: TextIO) -> None:
    """The plan for a person."""
    choice = plan.choice
    weights = "no weights here" if model.revision is None else f"revision {model.revision}"
    title = f"{model.name} ({config.architecture}, {weights})"
    lanes = f"{plan.spec.dp} lane{'s' * (plan.spec.dp > 1)} of {plan.spec.tp} device{'s' * (plan.spec.tp > 1)}"
    print(f"{title} on {plan.spec}: {lanes}, {choice.dtype}, numerics {choice.numerics}\n", file=out)
    show_table("bytes of one device", _memory(plan), out)
    show_table("\nweights that hold nothing new, of one device", _waste(plan), out)
    show_table("\nwhat fits, per lane", [_room(plan)], out)
    programs = [{**_step(step), **_flat(_sent(plan, step))} for step in plan.steps]
    show_table(f"\n{len(plan.steps)} step programs and {plan.loads} that load rows", programs, out)
    served = dict.fromkeys(part for step in plan.steps for part in step.attention)
    for part in served:
        print(f"  {part.part} by {part.name}: {part.reason}", file=out)
    if plan.read_s is not None:
        print(f"\nreading the weights once takes {plan.read_s * 1e3:.3g} ms: no decode step is shorter", file=out)
    if not plan.fits:
        print(f"\nDOES NOT FIT: {size(plan.total_bytes)} of {size(plan.device.memory_bytes)}", file=out)


def _memory(plan: Plan) -> list[Mapping[str, object]]:
    memory = plan.device.memory_bytes
    parts = {
        "weights": plan.weights_bytes,
        "KV pool": plan.kv_bytes,
        "history, tables, sampling records": plan.state_bytes,
        "temporaries, estimate": plan.temporary_bytes,
        "together": plan.total_bytes,
    }
    if memory is not None:
        parts |= {"left for the runtime": memory - plan.total_bytes, "device": memory}
    return [
        {"": name, "size": size(part), "bytes": part, "of the device": f"{part / memory:.1%}" if memory else None}
        for name, part in parts.items()
    ]


def _waste(plan: Plan) -> list[Mapping[str, object]]:
    rows = [
        {"": cause, "bytes": part, "of the weights": f"{part / plan.weights_bytes:.2%}"}
        for cause, part in plan.padding.items()
    ]
    if plan.kv_copies > 1:
        copies = plan.kv_bytes - plan.kv_bytes // plan.kv_copies
        rows.append({"": f"KV pool: each kv head on {plan.kv_copies} devices", "bytes": copies})
    return rows


def _room(plan: Plan) -> Mapping[str, object]:
    sizes = plan.choice.sizes
    return {
        "blocks": sizes.num_blocks,
        "positions a block": sizes.block_size,
        "bytes a block": plan.block_bytes,
        "tokens": plan.tokens,
        "longest sequence": sizes.max_length,
        "of them at once": plan.whole_sequences,
        "sequences at once": sizes.max_rows,
    }


def _step(step: Step) -> dict[str, object]:
    return {
        "program": str(step.bucket),
        "attention": ", ".join(f"{part.part} {part.name}" for part in step.attention),
    }


def _sent(plan: Plan, step: Step) -> dict[str, dict[str, float]]:
    """By kind of collective; bytes are results on one device, `wire` what one device sends in a ring."""
    return {
        each.kind: {
            "calls": each.calls,
            "bytes_per_step": each.result_bytes,
            "bytes_per_token": each.result_bytes / step.bucket.tokens,
            "wire_bytes_per_token": each.wire_bytes(plan.spec.tp) / step.bucket.tokens,
        }
        for each in step.collectives
    }


def _flat(sent: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    return {
        f"{kind} {name}": each[key]
        for kind, each in sent.items()
        for name, key in (("calls", "calls"), ("bytes a token", "bytes_per_token"))
    }
