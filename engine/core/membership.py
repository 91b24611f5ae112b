"""Which lanes a front serves with, and how a lane joins, leaves and is told that it was cut off.

    lane    JOINING --Hello...Welcome--> JOINED --Refused | the front is silent--> FENCED: start anew, new name
    front   Hello --> session, lane_up          silent for SILENT_S | connection lost --> lane_lost, never again

A name is that of one life of a lane. Once the front has given a name up it refuses whatever bears it, so a process
that was stopped and goes on later learns that its streams are served elsewhere before it can say anything of them.
Pure: `now` is an argument; packets are returned. Cost: a session a lane (engine/core/session.py).
"""

from collections import OrderedDict
from itertools import permutations
from typing import NamedTuple

from engine.core.messages import Meet, ToFront, ToLane
from engine.core.roles import Role
from engine.core.router import Router
from engine.core.session import AGAIN_S, Packet, Session

REMEMBERED = 4096  # names that were given up


class Hello(NamedTuple):
    """Lane to front: I am ready to serve on `tp` devices; other lanes reach my processes at `addresses`."""

    name: str
    role: Role
    addresses: tuple[str, ...] = ()
    tp: int = 1


class Welcome(NamedTuple):
    """Front to lane: this is our session."""

    name: str
    session: int


class Refused(NamedTuple):
    """Front to lane: you are not mine any more."""

    name: str


class Line(NamedTuple):
    """Between a process and the front where nobody holds its input and output: a line of JSON, either way."""

    text: str


Said = Hello | Packet  # by a lane
Answered = Welcome | Refused | Packet  # by a front


class Members:
    """The front's side: a session for every lane that is there. `first_session` is random, so that none repeats."""

    def __init__(self, router: Router, first_session: int):
        self.router = router
        self.sessions: dict[str, Session] = {}
        self._next = first_session
        self._gone: OrderedDict[str, None] = OrderedDict()
        self._reached: dict[str, Hello] = {}

    def receive(self, now: float, name: str, said: Said) -> list[tuple[str, Answered]]:
        """Take in what lane `name` says; what to answer."""
        session = self.sessions.get(name)
        if isinstance(said, Hello):
            if name in self._gone:
                return [(name, Refused(name))]
            if session is None:
                session = self.sessions[name] = Session(self._next, now)
                self._next += 1
                self.router.lane_up(name, said.role)
                self._introduce(said._replace(name=name))
            session.heard_at = now
            return [(name, Welcome(name, session.number))]
        if session is None or session.number != said.session:
            return [(name, Refused(name))]
        for message in session.receive(now, said):
            self.router.receive(name, message)  # type: ignore[arg-type]  # what a lane's session carries
        return []

    def _introduce(self, new: Hello) -> None:
        """Tell a new lane and the others where they reach each other."""
        pairs = [pair for known in self._reached.values() for pair in permutations((new, known))]
        for one, other in pairs:
            self.router.outbox.append((one.name, Meet(other.name, other.addresses, other.tp)))
        if new.addresses:
            self._reached[new.name] = new

    def reached(self, name: str) -> Hello:
        """Where a lane is reached; of one that is gone, nowhere."""
        return self._reached.get(name, Hello(name, "both"))

    def lost(self, name: str) -> None:
        """Give a lane up: it was silent, or its connection is gone."""
        self._reached.pop(name, None)
        if self.sessions.pop(name, None) is not None:
            self._gone[name] = None
            while len(self._gone) > REMEMBERED:
                self._gone.popitem(last=False)
            self.router.lane_lost(name)

    def silent(self, now: float) -> list[str]:
        """Lanes that have said nothing for too long."""
        return [name for name, session in self.sessions.items() if session.lost(now)]

    def flush(self, now: float) -> list[tuple[str, Answered]]:
        """What the router has to say, as packets."""
        sent: list[tuple[str, Answered]] = []
        outbox = self.router.outbox
        self.router.outbox = []
        for name, message in outbox:
            if (session := self.sessions.get(name)) is not None:
                sent += [(name, packet) for packet in session.send(now, message)]
        return sent

    def tick(self, now: float) -> list[tuple[str, Answered]]:
        """Give silent lanes up, repeat what is overdue, let deadlines pass."""
        for name in self.silent(now):
            self.lost(name)
        self.router.tick(now)
        sent: list[tuple[str, Answered]] = []
        for name, session in self.sessions.items():
            sent += [(name, packet) for packet in session.tick(now)]
        return sent + self.flush(now)


class Member:
    """A lane's side, for one life: when it is `fenced` the lane drops everything and makes a new one."""

    def __init__(self, name: str, role: Role, now: float, addresses: tuple[str, ...] = (), tp: int = 1):
        self.name, self.fenced = name, False
        self._hello = Hello(name, role, addresses, tp)
        self.session: Session | None = None
        self._hello_at = now

    def receive(self, now: float, answered: Answered) -> list[ToLane]:
        """The front's messages that are next in order."""
        if isinstance(answered, Welcome):
            if self.session is None and answered.name == self.name:
                self.session = Session(answered.session, now)
        elif isinstance(answered, Refused):
            self.fenced |= answered.name == self.name
        elif self.session is not None and answered.session == self.session.number:
            return self.session.receive(now, answered)  # type: ignore[return-value]  # what a front's session carries
        return []

    def send(self, now: float, message: ToFront) -> list[Said]:
        """Packets to put on the link now."""
        assert self.session is not None, "nothing runs before the front is known"
        return list(self.session.send(now, message))

    def tick(self, now: float) -> list[Said]:
        """A Hello until it is answered; then what is overdue. A front that is silent fences its lanes."""
        if self.session is not None:
            self.fenced |= self.session.lost(now)
            return list(self.session.tick(now))
        if now < self._hello_at:
            return []
        self._hello_at = now + 2 * AGAIN_S
        return [self._hello]
