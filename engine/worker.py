"""`serac worker`: one process of a lane, for the front that started it. A lane is one such process, or several.

hello -> "start": the processes of the lane meet -> model loaded, programs compiled -> ready
      -> "front": joins the front and serves (rank 0), follows rank 0 (the others)
its input ends, SIGTERM -> 0; before it serves, its end at once; another process of its lane is lost -> 75
"""

import logging
import os
import signal
import sys
from functools import partial

from engine.clock import SystemClock
from engine.config import Settings
from engine.hello import Doors, Place
from engine.movers.choice import check, choose
from engine.movers.spans import Span
from engine.observe import logs
from engine.replica import orders
from engine.replica.build_lane import Built, choose_lane, lane
from engine.replica.channel import Channel
from engine.replica.follower import Follower
from engine.replica.followers import Followers, Lockstep
from engine.replica.joined import Joined
from engine.replica.moves import Reach
from engine.replica.team import meet_followers, meet_leader
from engine.starter import Starter
from sharding import processes

LISTEN = "127.0.0.1:0"


def run(settings: Settings, place: Place, doors: Doors | None, starter: Starter) -> int:
    """Serve until the input ends; returns the exit code. The hello was said."""
    logs.start(sys.stderr, "text" if sys.stderr.isatty() else "json", settings.log_level)
    check(settings.kv_mover)
    start = starter.wait("start")["start"]
    if place.processes > 1:
        starter.show("connect", 0, 1)
        processes.join(place.rank, place.processes, start["coordinator"], place.local_ids)
    starter.show("devices", 0, 1)
    chosen = choose_lane(settings)
    secret = bytes.fromhex(start["secret"])
    if place.rank:
        channel = meet_leader(start["orders"], place.lane, place.rank, secret, chosen.geometry)
        built = lane(settings, place.lane, chosen, starter.show, partial(together, channel), logged=False)
        return follow(settings, place, built, starter, channel)
    if doors is None:
        built = lane(settings, place.lane, chosen, starter.show)
        return lead(settings, place, built, starter, Followers((), starter.lost))
    about = place.lane, place.processes, secret, chosen.geometry, starter.lost
    followers = meet_followers(doors.orders, *about)
    built = lane(settings, place.lane, chosen, starter.show, followers.together)
    return lead(settings, place, built, starter, followers)


def lead(settings: Settings, place: Place, built: Built, starter: Starter, followers: Followers) -> int:
    """Join the front with the lane, and serve."""
    device = Lockstep(built.device, followers, starter.lost) if followers.channels else built.device

    def make_lane(name, courier):
        return built.make_lane(name, courier, device)

    starter.say(event="ready", lane=place.lane, role=place.role, rank=0, **built.facts)
    found = reach(settings, place, built, starter)
    about = make_lane, built.names, found, built.content, SystemClock()
    joined = Joined(place.role, *about, Span(built.tp, place.processes), followers)
    signal.signal(signal.SIGTERM, lambda *_: joined.stop())
    joined.run(lambda name: starter.say(event="life", name=name))
    found.ways.close()
    built.close()
    followers.close()
    return ended(place)


def follow(settings: Settings, place: Place, built: Built, starter: Starter, channel: Channel) -> int:
    """Carry out the leader's orders until it ends."""
    leaving: list[bool] = []
    signal.signal(signal.SIGTERM, lambda *_: leaving.append(True))  # the leader ends first, and this with it
    starter.say(event="ready", lane=place.lane, role=place.role, rank=place.rank, **built.facts)

    def lost(reason: str) -> None:
        if leaving:
            os._exit(ended(place))
        starter.lost(reason)

    span = Span(built.tp, place.processes)
    found = reach(settings, place, built, starter)
    about = built.device, built.bounds, found, built.content, SystemClock()
    Follower(channel, place.rank, span, *about, lost).run()
    found.ways.close()
    return ended(place)


def reach(settings: Settings, place: Place, built: Built, starter: Starter) -> Reach:
    """How this process reaches the front and other lanes, once the starter says it."""
    words = starter.wait("front")
    listen = [words.get("listen", LISTEN)]
    ways = choose(settings.kv_mover, listen, place.trusted)
    return Reach(words["front"], listen, bytes.fromhex(words["secret"]), built.geometry, ways=ways)


def together(channel: Channel, found: str) -> None:
    """Wait until every process of the lane has come so far."""
    channel.say(orders.Here(found))
    if not isinstance(order := channel.receive(), orders.Go):
        raise RuntimeError(f"expected Go, got {type(order).__name__}")


def ended(place: Place) -> int:
    """Said in the log; JAX would wait at its exit for processes of the lane that have ended already."""
    logging.getLogger("serac").info("left")
    if place.processes > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
    return 0
