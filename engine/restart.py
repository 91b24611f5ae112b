"""`serac restart` and `serac drain`: an operator's wish, and how far the server has come with it.

    restart   d1: draining, 3 under way -> d1: starting ... -> d1: ready, after 12.3 s -> the next lane -> 0
    drain     the server refuses new requests, open ones end, and then it

For a person a line a step; off a terminal a JSON line.
"""

import json
from collections.abc import Sequence
from typing import TextIO

from engine.serve.client import Client


def run(client: Client, lanes: Sequence[str], drain_s: float | None, out: TextIO) -> int:
    """Restart lanes, all where none is named. Raises NotReady at the first that is not there, before or after."""
    for step in client.restart(lanes, drain_s):
        if out.isatty():
            print(f"{step.lane}: {step.state}, {step.message}", file=out, flush=True)
        else:
            words = {"lane": step.lane, "state": step.state, "message": step.message}
            print(json.dumps(words), file=out, flush=True)
    return 0


def drain(client: Client, timeout_s: float | None, out: TextIO) -> int:
    """End the server; 1 when the time was up and streams were cut off."""
    unfinished = client.drain(timeout_s)
    if out.isatty():
        print(f"drained; {unfinished} cut off" if unfinished else "drained", file=out)
    else:
        print(json.dumps({"drained": not unfinished, "unfinished": unfinished}), file=out)
    return 1 if unfinished else 0
