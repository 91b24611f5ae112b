"""`serac worker`: one lane in a process of its own, for the front that started it.

    model loaded, programs compiled -> prints {"event": "ready", ...}
    reads {"front": ..., "secret": ...} -> joins the front and serves
    its input ends, SIGTERM -> 0; before it serves, its end at once

How to join comes by standard input and so never stands in arguments or the environment.
"""

import json
import logging
import os
import queue
import signal
import sys
import threading
from typing import IO

from engine.clock import SystemClock
from engine.config import Settings
from engine.core.roles import Role
from engine.errors import ConfigError
from engine.observe import logs
from engine.progress import progress
from engine.replica.build_lane import lane
from engine.replica.joined import Joined, Reach

LISTEN = "127.0.0.1:0"


def run(settings: Settings, slot: str, role: Role, source: IO[str], out: IO[str]) -> int:
    """Serve until the input ends; returns the exit code."""
    logs.start(sys.stderr, "text" if sys.stderr.isatty() else "json", settings.log_level)
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(source, lines), daemon=True).start()
    with progress(sys.stderr) as bar:
        built = lane(settings, slot, bar.show)
    say(out, {"event": "ready", "lane": slot, "role": role, **built.facts})
    words = json.loads(lines.get())
    if not {"front", "secret"} <= words.keys():
        raise ConfigError('worker: expected a line {"front": ADDRESS, "secret": HEX} on standard input')
    reach = Reach(words["front"], [words.get("listen", LISTEN)], bytes.fromhex(words["secret"]), built.geometry)
    joined = Joined(role, built.make_lane, built.names, reach, built.content, SystemClock())
    signal.signal(signal.SIGTERM, lambda *_: joined.stop())
    joined.run(lambda name: say(out, {"event": "life", "name": name}))
    built.close()
    logging.getLogger("serac").info("left")
    return 0


def say(out: IO[str], words: dict[str, object]) -> None:
    """One line for whoever started this process."""
    print(json.dumps(words), file=out, flush=True)


def _listen(source: IO[str], lines: queue.SimpleQueue[str]) -> None:
    """Hear what is said, also while programs compile; the process that started this one is gone when it ends."""
    for line in source:
        lines.put(line)
    os.kill(os.getpid(), signal.SIGTERM)
