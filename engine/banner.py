"""What a server says of itself when it is ready: a table for a person, one JSON line for a program.

serac 0.1.0  tiny  revision 3f2a...
  grpc       127.0.0.1:50051
  mesh       tp=8
  ...
"""

import json
from collections.abc import Mapping
from typing import TextIO

INDENT = "  "


def show(title: str, facts: Mapping[str, object], out: TextIO) -> None:
    """Write the banner to `out`: for a terminal aligned lines, else a JSON object with event "ready"."""
    if out.isatty():
        width = max(map(len, facts), default=0)
        lines = [title, *(f"{INDENT}{name:<{width}}  {readable(value)}" for name, value in facts.items())]
        text = "\n".join(lines)
    else:
        text = json.dumps({"event": "ready", "title": title, **facts}, default=str)
    print(text, file=out, flush=True)


def readable(value: object) -> str:
    """A value in one line: mappings as `weights 5.1 MiB, kv 64 MiB`, lists joined."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {readable(part)}" for name, part in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(readable, value))
    return str(value)


def size(num_bytes: float) -> str:
    """Bytes with a binary unit and three digits: 5.13 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.4g} TiB"
