"""KV out of one process of a lane and into it: its links, what it sends of a part, what it gathers of one.

    gathered --leave--> heads on the host --cut--> to each process that wants some --links-->
    links --> pieces --Landing--> `landed(lane, part)`, once all heads of this process are here

Every process of a lane has such, the leader and its followers (engine/movers/spans.py says who sends what). What is
not KV is for the leader alone. Blocks that leave are brought to the host on a thread of their own.
"""

import logging
import queue
import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

from engine.clock import Clock
from engine.core.handoff import Parts
from engine.movers.choice import Ways
from engine.movers.geometry import Geometry
from engine.movers.links import Links
from engine.movers.parts import Heads
from engine.movers.spans import Piece, Span, heads_of, lane_of, pieces, rank_name
from engine.movers.tls import Tls
from engine.replica.landing import Landing

logger = logging.getLogger("serac.worker")


class Reach(NamedTuple):
    """How a process reaches the others. listen: addresses of its own; secret: that of the cluster; ways: of KV."""

    front: str
    listen: Sequence[str]
    secret: bytes
    geometry: Geometry
    tls: Tls | None = None
    ways: Ways = Ways()


class Bytes(NamedTuple):
    """Between what a device gathers and what a link carries.

    leave   (staged, blocks) -> Heads on the host, in order, of this process; waits for the device
    arrive  Heads of this process -> what the device scatters
    """

    leave: Callable[[object, int], Sequence[Heads]]
    arrive: Callable[[Heads], object]


class Moves:
    """Of process `rank` of lane `name`, whose devices are spread as `span` says."""

    def __init__(
        self,
        name: str,
        rank: int,
        span: Span,
        reach: Reach,
        content: Bytes,
        clock: Clock,
        hear: Callable[[str, object], None],
        landed: Callable[[str, Parts], None],
    ):
        self._rank, self._span, self._kv_heads = rank, span, reach.geometry.kv_heads
        self._content, self._landed = content, landed
        self._others: dict[str, list[Piece]] = {}  # what is sent to each
        self._processes: dict[str, int] = {}
        self._hear_others = hear
        self._landing = Landing(*heads_of(self._kv_heads, span, rank))
        self._leaving: queue.SimpleQueue[tuple[str, Parts] | None] = queue.SimpleQueue()
        about = reach.geometry, clock, reach.tls, *reach.ways
        self.links = Links(rank_name(name, rank), reach.secret, self._hear, lambda peer: None, *about)
        self.links.start(reach.listen)
        self._thread = threading.Thread(target=self._bring, name=f"leaving {name}", daemon=True)
        self._thread.start()

    def meet(self, lane: str, addresses: Sequence[str], tp: int) -> None:
        """Another lane has `tp` devices, and its processes are reached there."""
        self._others[lane] = self._pieces(Span(tp, len(addresses)))
        self._processes[lane] = len(addresses)
        for rank, address in enumerate(addresses):
            self.links.meet(rank_name(lane, rank), address)

    def forget(self, lane: str) -> None:
        """Close what leads to a lane and what comes from it, whoever of its processes that is."""
        self._others.pop(lane, None)
        for rank in range(self._processes.pop(lane, 1)):
            self.links.forget(rank_name(lane, rank))

    def send(self, lane: str, part: Parts) -> None:
        """Bring the heads of a gathered part to those who want them; returns at once."""
        self._leaving.put((lane, part))

    def close(self) -> None:
        """End the thread and all connections."""
        self._leaving.put(None)
        self._thread.join()
        self.links.close()

    def _pieces(self, other: Span) -> list[Piece]:
        return [piece for piece in pieces(self._kv_heads, self._span, other) if piece.source == self._rank]

    def _bring(self) -> None:
        while (item := self._leaving.get()) is not None:
            lane, part = item
            wanted = self._others[lane] if lane in self._others else self._pieces(Span(1, 1))
            if not wanted:
                continue
            try:
                heads = self._content.leave(part.staged, part.num_blocks)
            except RuntimeError as error:  # the device failed: the target asks again
                logger.warning("blocks for lane %s were lost: %s", lane, type(error).__name__)
                continue
            for piece in wanted:
                self.links.post(rank_name(lane, piece.target), part._replace(staged=cut(heads, piece)))

    def _hear(self, sender: str, message: object) -> None:
        """What comes; on the thread of the links."""
        if not isinstance(message, Parts):
            self._hear_others(sender, message)
            return
        lane, _ = lane_of(sender)
        if (part := self._landing.heard(lane, message)) is not None:
            if isinstance(part.staged, Heads):
                part = part._replace(staged=self._content.arrive(part.staged))
            self._landed(lane, part)


def cut(heads: Sequence[Heads], piece: Piece) -> tuple[Heads, ...]:
    """Those of `heads` that a piece holds, without a copy."""
    found = []
    for each in heads:
        first, stop = max(each.first_head, piece.first_head), min(each.stop_head, piece.stop_head)
        if first < stop:
            inside = slice(first - each.first_head, stop - each.first_head)
            found.append(Heads(each.keys_KLnCH[inside], each.values_KLnCH[inside], first))
    return tuple(found)
