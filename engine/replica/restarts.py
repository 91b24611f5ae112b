"""How a replica's lanes are restarted, for whoever can do that: engine/rolling.py where they are processes.

restart(lanes, drain_s, tell, leave)   no lanes: all   tell(lane, state, message)   leave: end after this one
"""

import threading
from collections.abc import Callable, Sequence

from engine.errors import NotReady

Tell = Callable[[str, str, str], None]  # (lane, state, message)
Restart = Callable[[Sequence[str], float, Tell, threading.Event], None]


def nothing_to_restart(lanes: Sequence[str], drain_s: float, tell: Tell, leave: threading.Event) -> None:
    """What a replica in one process answers. Raises NotReady."""
    raise NotReady("restart: the lanes are in the process of the server, and nothing starts that again; drain it")
