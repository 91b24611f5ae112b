"""Two releases that speak to each other: what one says in its newest version, as an older one has it.

    post --newest--> queue --> connection that agreed on an older version: said anew in it --> frame of that version

To say more in version 2, a release has in engine/movers/words.py and engine/movers/frames.py:

    the class       gains a last field with a default            why: str = ""
    TABLES[1]       does not have it                             group(..., without=("why",))
    TABLES[2]       {**TABLES[1], its number: with it, 67: (Packet, packet(2))}
    SPOKEN          Versions(newest=2, oldest=1)

The release that speaks 3 lets 1 go. A kind that an older version lacks is dropped on such a connection and counted:
it is first sent by a release that no longer speaks the older one. Cards have tables of their own, by the same rules
(engine/movers/cards.py); what bulk connections say is the same in all versions so far.

Cost: nothing where both are of one release; else a message is read and written once more, 20 to 100 us.
"""

import struct

from engine.movers import words
from engine.movers.frames import PREFIX, frame, read_prefix

VERSION = struct.Struct("<4xH")


def spoken(said: bytes, version: int) -> bytes:
    """The frame `said` as `version` has it. Raises Malformed where that lacks such a kind."""
    (found,) = VERSION.unpack_from(said)
    if found == version:
        return said
    prefix, header = read_prefix(said, version=found), said[PREFIX:]
    if prefix.kind in words.TABLES[found]:
        # Moments travel as seconds from now, so any now will do for both.
        message = words.from_bytes(prefix.kind, header, 0.0, found)
        return frame(*words.to_bytes(message, 0.0, version), version=version)
    return frame(prefix.kind, header, prefix.payload, version)
