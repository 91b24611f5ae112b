"""What was found to be fastest on a kind of device, as data: one file a kind, tuned/nvidia-h200.json.

    part, dtype, pool, head width, group, block, tokens up to a power of two -> kernel, fields of its Config

    {"schema": 1, "device": "NVIDIA H200",
     "runs": [{"date": "...", "jax": "...", "driver": "...", "commit": "..."}],
     "entries": [{"part": "decode", "dtype": "bfloat16", "pool": "bfloat16", "head_width": 128, "group": 4,
                  "block": 64, "tokens": 64, "kernel": "mosaic", "config": {"stages": 4}, "run": 0, ...}]}

`python -m bench tune` writes it; the time that was measured and that of the kernel's rule stand beside each config.
An entry of another kernel than the one that asks, or no entry, means that the kernel's rule decides. The invariant
parts never look: their bits must not depend on a file.

Cost: a file is read once, while the first program is traced.
"""

import functools
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NamedTuple

from pallas_kernels.shape import Shape
from pallas_kernels.target import Target

SCHEMA = 1
FOLDER = Path(__file__).parent / "tuned"
PARTS = ("decode", "chunks")
CURE = "write it anew with `python -m bench tune`, or delete it: every kernel has a rule"


class Key(NamedTuple):
    """What decides which config is fastest, and is the same in every call of a program."""

    part: str
    dtype: str  # of the queries
    pool: str
    head_width: int
    group: int
    block: int
    tokens: int


Entry = Mapping[str, object]


def find(
    target: Target,
    part: str,
    shape: Shape,
    tokens: int,
    *,
    kernel: str,
    fields: Collection[str],
    folder: Path = FOLDER,
) -> Mapping[str, int] | None:
    """Fields of the config of `kernel` for a step of so many tokens (rows, for decode); None: ask the rule.

    fields   those that the kernel's Config has
    Raises ValueError, which names the file, where it is broken or an entry names a field that is not in `fields`.
    """
    file = file_of(target, folder)
    if part not in PARTS or not target.kind or (entry := entries(file).get(key(part, shape, tokens))) is None:
        return None
    if entry["kernel"] != kernel:
        return None
    config = entry["config"]
    if unknown := sorted(config.keys() - set(fields)):
        raise ValueError(
            f"{file.name}: {part} of {kernel} has no {', '.join(unknown)}, only {', '.join(fields)}; {CURE}"
        )
    return config


def key(part: str, shape: Shape, tokens: int) -> Key:
    """Where the entry of a step stands: tokens count up to the next power of two."""
    bucket = 1 << max(tokens - 1, 0).bit_length()
    return Key(part, shape.dtype, shape.pool_dtype, shape.head_width, shape.group, shape.block, bucket)


def file_of(target: Target, folder: Path = FOLDER) -> Path:
    """The file of a kind of device: NVIDIA H200 has nvidia-h200.json."""
    return folder / ("-".join(target.kind.lower().split()) + ".json")


@functools.cache
def entries(file: Path) -> Mapping[Key, Entry]:
    """What a file holds; nothing where there is none."""
    return parse(file.name, file.read_text(encoding="utf-8")) if file.exists() else {}


def parse(name: str, text: str) -> Mapping[Key, Entry]:
    """The entries of a file's text. Raises ValueError, which names the file, where it is not as described above."""
    try:
        whole = json.loads(text)
        if whole["schema"] != SCHEMA:
            raise ValueError(f"schema {whole['schema']!r}; expected {SCHEMA}")
        found = {}
        for entry in whole["entries"]:
            at = Key(*(entry[field] for field in Key._fields))
            if at in found:
                raise ValueError(f"two entries for {at}")
            found[at] = check(entry)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{name}: {what}; {CURE}") from error
    return found


def check(entry: Entry) -> Entry:
    """Raises ValueError where an entry says what no kernel could take."""
    config = entry["config"]
    if entry["part"] not in PARTS:
        raise ValueError(f"part {entry['part']!r}; expected one of {', '.join(PARTS)}")
    if not isinstance(entry["kernel"], str) or not isinstance(config, dict):
        raise ValueError(f"kernel {entry['kernel']!r} with config {config!r}; expected a name and an object")
    if bad := [f"{field}={value!r}" for field, value in config.items() if type(value) is not int or value < 1]:
        raise ValueError(f"config {', '.join(bad)}; expected integers from 1 on")
    return entry
