"""The other ends of `python -m bench lockstep`: followers that launch nothing, and a front that only listens.

    leader --Plan--> follower: decoded, checked as every follower checks it, the moment it would launch --Have-->
    lane --Emission--> front: decoded, the moment --Packet-->

Moments are nanoseconds of the machine's monotonic clock, which its processes share.
"""

import contextlib
import socket
import sys
import threading
import time

from engine.core.session import Packet
from engine.errors import GroupLost
from engine.movers.links import Links
from engine.observe.plan_bytes import Bounds, check_plan
from engine.replica.channel import Channel
from engine.replica.orders import Have, Plan

BOUNDS = Bounds(1 << 16, 16, 4096, 1 << 15, 1 << 14, 1 << 18)
SECRET = bytes(32)  # of a bench on loopback
FRONT, LANE = "front", "lane"


def follow(address: str) -> None:
    """Say for each plan when it would be launched here, until the leader ends."""
    host, port = address.rsplit(":", 1)
    channel = Channel(socket.create_connection((host, int(port))), "the leader")
    with contextlib.suppress(GroupLost):
        while True:
            order = channel.receive()
            if isinstance(order, Plan):
                check_plan(order.plan, BOUNDS)
                channel.say(Have("", order.number, time.monotonic_ns(), 0, 0, 1))


def front() -> None:
    """Say for each packet of a lane when it was heard here, until the input ends."""

    def hear(sender: str, message: object) -> None:
        if isinstance(message, Packet):
            links.post(sender, message._replace(number=0, acknowledged=time.monotonic_ns(), message=None))

    over = threading.Event()
    links = Links(FRONT, SECRET, hear, lambda peer: over.set())
    links.start(["127.0.0.1:0"])
    print(links.addresses[0], flush=True)
    over.wait()
    links.close()


if __name__ == "__main__":
    front() if sys.argv[1:] == ["front"] else follow(sys.argv[1])
