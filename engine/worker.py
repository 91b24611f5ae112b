"""`serac worker`: one process of a lane, for the front that started it. A lane is one such process, or several.

hello -> "start": the processes of the lane meet -> model loaded, programs compiled -> ready
      -> "front": joins the front and serves (rank 0), follows rank 0 (the others)
its input ends, SIGTERM -> 0; before it serves, its end at once; another process of its lane is lost -> 75
"""

import ipaddress
import logging
import os
import signal
import sys
import threading
from functools import partial
from typing import NamedTuple

from engine.certificates import given
from engine.clock import SystemClock
from engine.config import Settings
from engine.errors import ConfigError, SeracError
from engine.hello import Doors, Place
from engine.movers.addresses import Address
from engine.movers.choice import check, choose
from engine.movers.spans import Span
from engine.movers.tls import Tls
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


class Here(NamedTuple):
    """What every part of a process needs to know of it."""

    settings: Settings
    place: Place
    starter: Starter
    tls: Tls | None


def run(settings: Settings, place: Place, doors: Doors | None, starter: Starter, tls: Tls | None) -> int:
    """Serve until the input ends; returns the exit code. The hello was said."""
    try:
        return serve(settings, place, doors, starter, tls)
    except SeracError as error:
        if place.processes == 1:
            raise
        print(f"serac: error: {error}", file=sys.stderr)
        starter.exit_code = error.exit_code
        return ended(place, starter)


def serve(settings: Settings, place: Place, doors: Doors | None, starter: Starter, tls: Tls | None) -> int:
    """The same, raising whatever is wrong."""
    logs.start(sys.stderr, "text" if sys.stderr.isatty() else "json", settings.log_level)
    check(settings.kv_mover)
    start = starter.wait("start")["start"]
    here = Here(settings, place, starter, given(starter, start.get("tls"), tls))
    check_orders(here)
    if place.processes > 1:
        starter.show("connect", 0, 1)
        processes.join(place.rank, place.processes, start["coordinator"], place.local_ids)
    starter.show("devices", 0, 1)
    chosen = choose_lane(settings)
    secret = bytes.fromhex(start["secret"])
    if place.rank:
        channel = meet_leader(start["orders"], place.lane, place.rank, secret, chosen.geometry, here.tls)
        built = lane(settings, place.lane, chosen, starter.show, partial(together, channel), logged=False)
        return follow(here, built, channel)
    if doors is None:
        return lead(here, lane(settings, place.lane, chosen, starter.show), Followers((), starter.lost))
    about = place.processes, secret, chosen.geometry, starter.lost, here.tls
    followers = meet_followers(doors.orders, place.lane, *about)
    return lead(here, lane(settings, place.lane, chosen, starter.show, followers.together), followers)


def check_orders(here: Here) -> None:
    """Raise ConfigError where orders would leave this host in the clear: they hold prompts."""
    beyond = not ipaddress.ip_address(here.place.interface).is_loopback
    if here.place.processes > 1 and beyond and here.tls is None:
        raise ConfigError("lane_interface: got one beyond this host, and no certificates; give certs in "
                          "[security], which serac certs init makes", field="lane_interface")  # fmt: skip


def lead(here: Here, built: Built, followers: Followers) -> int:
    """Join the front with the lane, and serve."""
    place, starter = here.place, here.starter
    device = Lockstep(built.device, followers, starter.lost) if followers.channels else built.device

    def make_lane(name, courier):
        return built.make_lane(name, courier, device)

    starter.say(event="ready", lane=place.lane, role=place.role, rank=0, **built.facts)
    found = reach(here, built)
    about = make_lane, built.names, found, built.content, SystemClock()
    joined = Joined(place.role, *about, Span(built.tp, place.processes), followers)
    signal.signal(signal.SIGTERM, lambda *_: joined.stop())
    joined.run(lambda name: starter.say(event="life", name=name))
    found.ways.close()
    built.close()
    followers.close()
    return ended(place, starter)


def follow(here: Here, built: Built, channel: Channel) -> int:
    """Carry out the leader's orders until it ends."""
    place, starter, leaving = here.place, here.starter, threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: leaving.set())  # the leader ends first, and this with it
    starter.say(event="ready", lane=place.lane, role=place.role, rank=place.rank, **built.facts)

    def lost(reason: str) -> None:
        if leaving.is_set():
            os._exit(ended(place, starter))
        starter.lost(reason)

    found = reach(here, built)
    about = built.device, built.bounds, found, built.content, SystemClock()
    Follower(channel, place.rank, Span(built.tp, place.processes), *about, lost).run()
    return ended(place, starter)


def reach(here: Here, built: Built) -> Reach:
    """How this process reaches the front and other lanes, once the starter says it."""
    words = here.starter.wait("front")
    listen = [words.get("listen") or str(Address("", here.place.interface, 0))]
    ways = choose(here.settings.kv_mover, listen, here.place.trusted)
    return Reach(words["front"], listen, bytes.fromhex(words["secret"]), built.geometry, here.tls, ways)


def together(channel: Channel, found: str) -> None:
    """Wait until every process of the lane has come so far."""
    channel.say(orders.Here(found))
    if not isinstance(order := channel.receive(), orders.Go):
        raise RuntimeError(f"expected Go, got {type(order).__name__}")


def ended(place: Place, starter: Starter) -> int:
    """Said in the log; JAX would wait at its exit for processes of the lane that have ended already."""
    logging.getLogger("serac").info("left")
    if place.processes > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(starter.exit_code)
    return starter.exit_code
