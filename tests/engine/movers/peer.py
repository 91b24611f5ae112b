"""Links of a process of its own: it sends back whatever it hears, until its input ends.

`python peer.py NAME SECRET [ADDRESS [sockets|nixl]]` prints where it listens.
"""

import sys

from drawn_messages import GEOMETRY

from engine.movers.links import Limits, Links
from engine.movers.nixl import Nixl


def main(name: str, secret: str, address: str = "127.0.0.1:0", way: str = "auto") -> None:
    mover = Nixl(1 << 20) if way == "nixl" else None
    links = Links(
        name,
        bytes.fromhex(secret),
        lambda sender, message: links.post(sender, message),
        lambda peer: None,
        GEOMETRY,
        limits=Limits(shared_bytes=0) if way == "sockets" else None,
        mover=mover,
    )
    links.start([address])
    print(links.addresses[0], flush=True)
    sys.stdin.read()
    links.close()
    if mover is not None:
        mover.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
