"""Links of a process of its own: it sends back whatever it hears, until its input ends.

`python peer.py NAME SECRET [ADDRESS]` prints where it listens.
"""

import sys

from drawn_messages import GEOMETRY

from engine.movers.links import Links


def main(name: str, secret: str, address: str = "127.0.0.1:0") -> None:
    links = Links(
        name,
        bytes.fromhex(secret),
        lambda sender, message: links.post(sender, message),
        lambda peer: None,
        GEOMETRY,
    )
    links.start([address])
    print(links.addresses[0], flush=True)
    sys.stdin.read()
    links.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
