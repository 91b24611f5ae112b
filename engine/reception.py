"""Processes of lanes that others start (Slurm, Kubernetes, Ray), as they come to the front and take their seats.

    Line(hello: lane, rank) --a free seat of that lane--> its lines go to the lane's keeper, and answers back
                               none: {"refused": why}       its connection ends: the seat is free, the lane ends

They have proved the cluster's secret, and under TLS their role, before a line of theirs is heard. All of this is on
the thread of the front's links.
"""

import json
import logging
from collections.abc import Callable, Mapping

from engine.cluster.process import Seat
from engine.core.membership import Line
from engine.errors import Malformed

logger = logging.getLogger("serac.supervisor")


class Reception:
    """`seats` by lane and rank; `post(name, line)` answers."""

    def __init__(self, seats: Mapping[tuple[str, int], Seat], post: Callable[[str, Line], object]):
        self._seats, self._post = seats, post
        self._sitting: dict[str, Seat] = {}

    def heard(self, sender: str, line: Line) -> None:
        """What a process says."""
        try:
            words = read(line.text)
        except Malformed as error:
            self._say(sender, {"refused": str(error)})
            return
        seat = self._sitting.get(sender) or self._seated(sender, words)
        if seat is not None:
            seat.heard(words)

    def gone(self, sender: str) -> bool:
        """The connection of a process has ended; whether it had a seat."""
        if (seat := self._sitting.pop(sender, None)) is not None:
            seat.gone(sender)
        return seat is not None

    def _seated(self, sender: str, words: dict) -> Seat | None:
        if words.get("event") != "hello":
            return None
        rank = words.get("rank")
        seat = self._seats.get((str(words.get("lane")), rank if isinstance(rank, int) else -1))
        if seat is None:
            self._say(sender, {"refused": "this cluster has no such lane and rank; is its topology the same here?"})
        elif seat.come(sender, lambda words: self._say(sender, words)):
            self._sitting[sender] = seat
            return seat
        else:  # the one before has not been given up yet; it asks again
            logger.info("rank %d of lane %s came again before the last one was gone", seat.rank, words["lane"])
        return None

    def _say(self, sender: str, words: dict) -> None:
        self._post(sender, Line(json.dumps(words)))


def read(text: str) -> dict:
    """The object of a line. Raises Malformed."""
    try:
        words = json.loads(text)
    except ValueError:
        words = None
    if not isinstance(words, dict):
        raise Malformed("line: got no JSON object; expected one")
    return words
