"""The lanes of other processes behind a replica's router: sessions over links, given up when they are lost.

    links --packets--> Members --> Router --> outputs          all of it where the replica's `dispatch` chooses
    Router --> Members --packets--> links

A connection that ends and a silence are the same: the lane is given up and what it served goes on elsewhere.
"""

import threading
from collections import deque
from collections.abc import Callable

from engine.clock import Clock
from engine.core.membership import Answered, Hello, Members
from engine.core.router import Router
from engine.core.session import Packet
from engine.movers.links import Links

TICK_S = 0.1
FORGET_S = 30.0  # a lane that was given up may come back to be told so

Dispatch = Callable[[Callable[[], None]], None]


class Remote:
    """`links` are the front's, which call `hear` and `gone`. `first_session` is random.

    `settle` is called after the router has heard something, where it lives.
    """

    def __init__(self, router: Router, clock: Clock, links: Links, first_session: int, settle: Callable[[], None]):
        self.members, self._clock, self._settle = Members(router, first_session), clock, settle
        self.links = links
        self._dispatch: Callable[[], Dispatch] = lambda: lambda call: call()
        self._leaving: deque[tuple[float, str]] = deque()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._tick, name="front", daemon=True)

    def start(self, dispatch: Callable[[], Dispatch]) -> None:
        """Take lanes in; `dispatch()` gives the way to the thread where the router lives."""
        self._dispatch = dispatch
        self._thread.start()

    def stop(self) -> None:
        """Leave the lanes to themselves."""
        self._stopping.set()
        self._thread.join()
        self.links.close()

    def flush(self) -> None:
        """Send what the router has to say to lanes elsewhere. Call it where the router lives."""
        self._post(self.members.flush(self._clock.now()))

    def hear(self, sender: str, said: object) -> None:
        """What a lane says; on the thread of the links."""
        if not isinstance(said, Hello | Packet):
            return

        def take() -> None:
            self._post(self.members.receive(self._clock.now(), sender, said))  # type: ignore[arg-type]
            self._settle()

        self._dispatch()(take)

    def gone(self, peer: str) -> None:
        """A lane's process has ended, as its connection says or whoever started it."""

        def give_up() -> None:
            if peer in self.members.sessions:
                self._leaving.append((self._clock.now() + FORGET_S, peer))
            self.members.lost(peer)
            self._settle()

        self._dispatch()(give_up)

    def _tick(self) -> None:
        def tick() -> None:
            now = self._clock.now()
            self._leaving += [(now + FORGET_S, name) for name in self.members.silent(now)]
            self._post(self.members.tick(now))
            while self._leaving and self._leaving[0][0] <= now:
                self.links.forget(self._leaving.popleft()[1])
            self._settle()

        while not self._stopping.wait(TICK_S):
            self._dispatch()(tick)

    def _post(self, packets: list[tuple[str, Answered]]) -> None:
        for name, packet in packets:
            self.links.post(name, packet)
