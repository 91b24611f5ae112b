"""How the processes of a lane find each other: followers dial the leader, and both prove who they are.

    leader    listens at the door of its hello --greeted, by rank--> Followers
    follower  dials it, again until it answers --greeted----------> Channel

Both compare what their lanes are made of (engine/movers/geometry.py) before weights are read: the greeting says the
difference in a sentence. Who has not come within MEET_S is named by rank.
"""

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Callable, Sequence

from engine.errors import GroupLost, Malformed, Misfit
from engine.movers import addresses
from engine.movers.geometry import Geometry
from engine.movers.greeting import Card, Stranger, greet_blocking
from engine.movers.spans import lane_of, rank_name
from engine.movers.tls import Tls
from engine.replica.channel import Channel
from engine.replica.followers import Followers

MEET_S = 60.0
GREETING_S = 5.0
AGAIN_S = 0.1
BROKEN = (OSError, EOFError)

logger = logging.getLogger("serac.worker")


def meet_followers(
    door: socket.socket,
    lane: str,
    processes: int,
    secret: bytes,
    geometry: Geometry,
    lost: Callable[[str], None],
    tls: Tls | None = None,
) -> Followers:
    """Every other process of the lane, greeted. Raises GroupLost where one is missing.

    One that does not fit is told so, and ends; whoever started it hears why.
    """
    found: dict[int, Channel] = {}
    mine, until = Card(lane, "", "control", "", geometry), time.monotonic() + MEET_S
    with Door(door, lambda connected: _greeted(connected, secret, mine, False, tls)) as there:
        while missing := sorted(set(range(1, processes)) - set(found)):
            if time.monotonic() > until:
                for channel in found.values():
                    channel.free()
                raise GroupLost(f"lane {lane}: rank {missing[0]} has not come within {MEET_S:.0f} s")
            for connected, card in there.look():
                _seat(connected, card, lane, missing, found)
    return Followers([found[rank] for rank in range(1, processes)], lost)


Greeted = tuple[socket.socket, Card]


class Door:
    """A listener whose guests are greeted on threads of their own: one who says nothing keeps nobody waiting."""

    def __init__(self, listener: socket.socket, greet: Callable[[socket.socket], Greeted | None]):
        self._listener, self._greet = listener, greet
        self._lock, self._shut = threading.Lock(), False
        self._came: list[Greeted] = []

    def look(self) -> list[Greeted]:
        """Those that were greeted since; waits for AGAIN_S at most."""
        self._listener.settimeout(AGAIN_S)
        with contextlib.suppress(TimeoutError):
            threading.Thread(target=self._welcome, args=(self._listener.accept()[0],), daemon=True).start()
        with self._lock:
            came, self._came = self._came, []
        return came

    def _welcome(self, connected: socket.socket) -> None:
        if (greeted := self._greet(connected)) is not None:
            with self._lock:
                if self._shut:
                    greeted[0].close()
                else:
                    self._came.append(greeted)

    def __enter__(self) -> "Door":
        return self

    def __exit__(self, *_: object) -> None:
        """Nobody is let in any more."""
        self._listener.close()
        with self._lock:
            self._shut = True
            for connected, _ in self._came:
                connected.close()


def _seat(
    connected: socket.socket, card: Card, lane: str, missing: Sequence[int], found: dict[int, Channel]
) -> None:
    """Take in a process that has been greeted, if it is one that is missing."""
    name, rank = lane_of(card.name)
    if name == lane and rank in missing and rank not in found:
        found[rank] = Channel(connected, f"rank {rank} of {lane}")
    else:
        connected.close()


def meet_leader(
    address: str, lane: str, rank: int, secret: bytes, geometry: Geometry, tls: Tls | None = None
) -> Channel:
    """The leader, greeted. Raises Misfit where this process does not fit, GroupLost where nobody answers."""
    found, until = addresses.parse(address), time.monotonic() + MEET_S
    while True:
        try:
            connected = socket.create_connection((found.host, found.port), timeout=GREETING_S)
        except OSError:
            connected = None
        mine = Card(rank_name(lane, rank), lane, "control", "", geometry)
        greeted = None if connected is None else _greeted(connected, secret, mine, True, tls)
        if greeted is not None:
            return Channel(greeted[0], f"the leader of {lane}")
        if time.monotonic() > until:
            raise GroupLost(f"lane {lane}: its leader has not answered within {MEET_S:.0f} s")
        time.sleep(AGAIN_S)


def _greeted(
    connected: socket.socket, secret: bytes, mine: Card, dialing: bool, tls: Tls | None
) -> tuple[socket.socket, Card] | None:
    """The connection, in TLS where there is any, and the card of who is at the other end; None: nobody of ours."""
    try:
        if tls is not None:
            connected = tls.wrap(connected, dialing, GREETING_S)
        return connected, greet_blocking(connected, secret, mine, dialing, GREETING_S)
    except Stranger as error:
        connected.close()
        if dialing:
            raise Misfit(str(error)) from None
        logger.warning("somebody was turned away: %s", error)
    except (Malformed, *BROKEN):
        connected.close()
    return None
