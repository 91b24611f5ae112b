"""A lane in a process of its own: joined to a front, met by other lanes, over as many lives as it takes.

    life:  name, links, agent made anew -> Hello -> serves -> refused, or the front is silent -> the next life

The loop of the lane runs on its own thread, connections and heartbeats on that of the links, so that a step never
delays a heartbeat; a loop that has not turned for HUNG_S says nothing any more, and the front gives it up.
Blocks that leave are brought to the host on a third thread.
"""

import logging
import queue
import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

from engine.clock import Clock
from engine.core import handoff
from engine.core.handoff import Parts
from engine.core.membership import Member, Said
from engine.core.messages import FRONT, Fence, Meet
from engine.core.roles import Role
from engine.movers.geometry import Geometry
from engine.movers.links import Links
from engine.replica.lane import Courier, Lane
from engine.replica.lane import Said as LaneSaid

TICK_S = 0.05
HUNG_S = 30.0

logger = logging.getLogger("serac.worker")


class Reach(NamedTuple):
    """How a lane reaches the others. listen: addresses of its own; secret: that of the cluster."""

    front: str
    listen: Sequence[str]
    secret: bytes
    geometry: Geometry


class Bytes(NamedTuple):
    """Between what a device gathers and what a link carries.

    leave   (staged, blocks) -> arrays on the host; waits for the device
    arrive  (keys, values) -> what the device scatters
    """

    leave: Callable[[object, int], object]
    arrive: Callable[[object], object]


class Joined:
    """`make_lane(name, courier)` makes a lane with nothing in it, its device reset. `run` returns after `stop`."""

    def __init__(
        self,
        role: Role,
        make_lane: Callable[[str, Courier], Lane],
        names: Callable[[], str],
        reach: Reach,
        content: Bytes,
        clock: Clock,
    ):
        self.role, self._make_lane, self._names, self._reach = role, make_lane, names, reach
        self._content, self._clock = content, clock
        self.lives = 0
        self.lane: Lane | None = None
        self._stopping = threading.Event()

    def stop(self) -> None:
        """Let `run` return soon. Any thread may call it."""
        self._stopping.set()

    def run(self, on_life: Callable[[str], None] = lambda name: None) -> None:
        """Serve, life after life; `on_life(name)` tells of each."""
        while not self._stopping.is_set():
            life = Life(self._names(), self.role, self._make_lane, self._reach, self._content, self._clock)
            self.lane, self.lives = life.lane, self.lives + 1
            on_life(life.lane.name)
            try:
                while not self._stopping.wait(TICK_S) and life.tick():
                    pass
            finally:
                life.end()


class Life:
    """One name, one session, one set of links."""

    def __init__(
        self,
        name: str,
        role: Role,
        make_lane: Callable[[str, Courier], Lane],
        reach: Reach,
        content: Bytes,
        clock: Clock,
    ):
        self._clock, self._content, self._lock = clock, content, threading.Lock()
        self.lane = make_lane(name, self)
        self.lane.connect(self._say)
        self._links = Links(name, reach.secret, self._hear, lambda peer: None, reach.geometry, clock)
        self._links.start(reach.listen)
        self._links.meet(FRONT, reach.front)
        self._member = Member(name, role, clock.now(), tuple(self._links.addresses[:1]))
        self._leaving: queue.SimpleQueue[tuple[str, Parts] | None] = queue.SimpleQueue()
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self.lane.run, self._bring)]
        for thread in self._threads:
            thread.start()

    def tick(self) -> bool:
        """Say Hello, repeat what is overdue; False when this life is over."""
        with self._lock:
            hung = self._clock.now() - self.lane.turned_at > HUNG_S
            self._post([] if hung else self._member.tick(self._clock.now()))
            return not self._member.fenced

    def end(self) -> None:
        """Drop everything."""
        self.lane.stop()
        self._leaving.put(None)
        for thread in self._threads:
            thread.join()
        self._links.close()

    def send(self, sender: str, receiver: str, part: Parts) -> None:
        """Bring gathered blocks to another lane; returns at once."""
        self._leaving.put((receiver, part))

    def _bring(self) -> None:
        while (item := self._leaving.get()) is not None:
            receiver, part = item
            try:
                staged = self._content.leave(part.staged, part.num_blocks)
            except RuntimeError as error:  # the device failed: the target asks again
                logger.warning("blocks for lane %s were lost: %s", receiver, type(error).__name__)
            else:
                self._links.post(receiver, part._replace(staged=staged))

    def _say(self, name: str, said: list[LaneSaid]) -> None:
        """What the lane says in a turn; on its thread."""
        for peer, message in said:
            if peer != FRONT:
                self._links.post(peer, message)
            else:
                with self._lock:
                    if self._member.session is not None:
                        self._post(self._member.send(self._clock.now(), message))  # type: ignore[arg-type]

    def _hear(self, sender: str, message: object) -> None:
        """What comes; on the thread of the links."""
        if sender != FRONT:
            if isinstance(message, Parts) and message.staged is not None:
                message = message._replace(staged=self._content.arrive(message.staged))
            if isinstance(message, handoff.Message):
                self.lane.hear(sender, message)
            return
        with self._lock:
            heard = self._member.receive(self._clock.now(), message)  # type: ignore[arg-type]
        for each in heard:
            if isinstance(each, Meet):
                self._links.meet(each.lane, each.addresses[0])
                continue
            if isinstance(each, Fence):
                self._links.forget(each.lane)
            self.lane.hear(FRONT, each)

    def _post(self, packets: list[Said]) -> None:
        for packet in packets:
            self._links.post(FRONT, packet)
