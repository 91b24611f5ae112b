"""A lane in processes of its own: joined to a front, met by other lanes, over as many lives as it takes.

    life:  name, links, agent made anew -> Hello -> serves -> refused, or the front is silent -> the next life

The loop of the lane runs on its own thread, connections and heartbeats on that of the links, so that a step never
delays a heartbeat; a loop that has not turned for HUNG_S says nothing any more, and the front gives it up.
Where the lane spans processes this is its leader: the others hear what it does (engine/replica/followers.py), and
each moves its own heads.
"""

import contextlib
import threading
from collections import deque
from collections.abc import Callable

from engine.clock import Clock
from engine.core import handoff
from engine.core.handoff import Parts
from engine.core.membership import Member, Said
from engine.core.messages import FRONT, Fence, Meet
from engine.core.roles import Role
from engine.errors import ConfigError
from engine.movers.spans import Span
from engine.replica import orders
from engine.replica.followers import Followers
from engine.replica.landing import Wholes
from engine.replica.lane import Courier, Lane
from engine.replica.lane import Said as LaneSaid
from engine.replica.moves import Bytes, Moves, Reach

ALONE = Span(1, 1)
TICK_S = 0.05
HUNG_S = 30.0
REMEMBERED = 256  # lanes that are gone


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
        span: Span = ALONE,
        followers: Followers | None = None,
    ):
        self.role, self._make_lane, self._names, self._reach = role, make_lane, names, reach
        self._content, self._clock, self._span = content, clock, span
        self._followers = followers or Followers((), lambda reason: None)
        self.lives = 0
        self.lane: Lane | None = None
        self._stopping = threading.Event()

    def stop(self) -> None:
        """Let `run` return soon. Any thread may call it."""
        self._stopping.set()

    def run(self, on_life: Callable[[str], None] = lambda name: None) -> None:
        """Serve, life after life; `on_life(name)` tells of each."""
        about = self._reach, self._content, self._clock, self._span, self._followers
        while not self._stopping.is_set():
            life = Life(self._names(), self.role, self._make_lane, *about)
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
        span: Span,
        followers: Followers,
    ):
        self._clock, self._followers, self._lock = clock, followers, threading.Lock()
        self.lane = make_lane(name, self)
        self.lane.connect(self._say)
        self._fenced, self._peers = deque[str](maxlen=REMEMBERED), threading.Lock()
        self._wholes, self._landing = Wholes(span.processes, followers.forget), threading.Lock()
        followers.hear = self._have
        self._moves = Moves(name, 0, span, reach, content, clock, self._hear, self._landed)
        self._moves.links.meet(FRONT, reach.front)
        addresses = (*self._moves.links.addresses[:1], *followers.born(name))
        self._me = Meet(name, addresses, span.tp)
        self._member = Member(name, role, clock.now(), addresses, span.tp)
        self._thread = threading.Thread(target=self.lane.run, daemon=True)
        self._thread.start()

    def tick(self) -> bool:
        """Say Hello, repeat what is overdue; False when this life is over."""
        with self._lock:
            hung = self._clock.now() - self.lane.turned_at > HUNG_S
            self._post([] if hung else self._member.tick(self._clock.now()))
            return not self._member.fenced

    def end(self) -> None:
        """Drop everything."""
        self.lane.stop()
        self._thread.join()
        self._moves.close()

    def send(self, sender: str, receiver: str, part: Parts) -> None:
        """Bring gathered blocks to another lane; returns at once."""
        self._followers.say(orders.Send(receiver, *part[:4]))
        self._moves.send(receiver, part)

    def _say(self, name: str, said: list[LaneSaid]) -> None:
        """What the lane says in a turn; on its thread."""
        for peer, message in said:
            if peer != FRONT:
                self._moves.links.post(peer, message)
            else:
                with self._lock:
                    if self._member.session is not None:
                        self._post(self._member.send(self._clock.now(), message))  # type: ignore[arg-type]

    def _hear(self, sender: str, message: object) -> None:
        """What comes and is no KV; on the thread of the links."""
        if sender != FRONT:
            if isinstance(message, handoff.Message):
                self.lane.hear(sender, message)
            elif isinstance(message, Meet) and message.lane == sender:
                with contextlib.suppress(ConfigError):  # it is nowhere that we may go
                    self._meet(message)
            return
        with self._lock:
            heard = self._member.receive(self._clock.now(), message)  # type: ignore[arg-type]
        for each in heard:
            if isinstance(each, Meet):
                self._meet(each)
                if each.foreign:
                    self._moves.links.post(each.lane, self._me)
                continue
            if isinstance(each, Fence):
                self._forget(each.lane)
            self.lane.hear(FRONT, each)

    def _meet(self, other: Meet) -> None:
        """Where each process of another lane is reached, for each of ours."""
        with self._peers:
            if other.lane not in self._fenced:
                self._moves.meet(other.lane, other.addresses, other.tp)
                self._followers.say(orders.Known(other.lane, other.addresses, other.tp))

    def _forget(self, lane: str) -> None:
        """A lane is gone for ever; what it still says of itself is not taken."""
        with self._peers:
            self._fenced.append(lane)
            self._moves.forget(lane)
            self._followers.say(orders.Forget(lane))

    def _landed(self, lane: str, part: Parts) -> None:
        """All heads of this process are here, or not as they were sent."""
        self._had(0, lane, part)

    def _have(self, rank: int, have: orders.Have) -> None:
        """So says another process of the lane."""
        self._had(rank, have.lane, Parts(*have[1:5], True if have.whole else None))

    def _had(self, rank: int, lane: str, part: Parts) -> None:
        with self._landing:
            whole = self._wholes.have(rank, lane, part)
        if whole is not None:
            self.lane.hear(lane, whole)

    def _post(self, packets: list[Said]) -> None:
        for packet in packets:
            self._moves.links.post(FRONT, packet)
