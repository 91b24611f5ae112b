"""KV that comes to a lane in pieces, until each of its processes has its heads and all of them have theirs.

    pieces of heads --Landing (every process)--> the heads of this process --Wholes (the leader)--> the lane's part
                       damaged: at once, empty

What is missing is not waited for here: the target asks again under a new generation (engine/core/handoff.py), and
with its first piece what came of earlier askings of that handoff is forgotten. Pure; cost: a dict entry a part, and
a copy of what came in more than one piece.
"""

import weakref
from collections import OrderedDict
from collections.abc import Callable

import numpy as np

from engine.core.handoff import Parts
from engine.movers.parts import Heads
from engine.replica.orders import Key

MOST = 256  # parts that are not whole yet

Named = tuple[str, Key]  # of which lane


class Landing:
    """The heads from `first` up to `stop` are this process's."""

    def __init__(self, first: int, stop: int):
        self._first, self._stop = first, stop
        self._open: OrderedDict[Named, list[Heads]] = OrderedDict()

    def heard(self, lane: str, part: Parts) -> Parts | None:
        """A piece of a part: the part with all heads of this process, empty where a piece is bad; None: not yet."""
        named = lane, key_of(part)
        if named not in self._open:
            forget_older(self._open, named)
        there = self._open.pop(named, [])
        piece = part.staged
        if not isinstance(piece, Heads) or not self._fits(piece, there):
            return part._replace(staged=None)
        there.append(piece)
        if sum(len(each.keys_KLnCH) for each in there) == self._stop - self._first:
            return part._replace(staged=joined(there))
        self._open[named] = there
        if len(self._open) > MOST:
            self._open.popitem(last=False)
        return None

    def _fits(self, piece: Heads, there: list[Heads]) -> bool:
        inside = self._first <= piece.first_head and piece.stop_head <= self._stop
        apart = all(piece.stop_head <= each.first_head or each.stop_head <= piece.first_head for each in there)
        alike = all(piece.keys_KLnCH.shape[1:] == each.keys_KLnCH.shape[1:] for each in there)
        return inside and apart and alike


class Arrived:
    """What came under `key`, here and in every other process of the lane; `forget(key)` when nobody took it."""

    def __init__(self, key: Key, content: object, forget: Callable[[Key], None]):
        self.key, self._content = key, content
        self._unwanted = weakref.finalize(self, forget, key)
        self._unwanted.atexit = False

    def take(self) -> object:
        """The content of this process, to be written."""
        self._unwanted.detach()
        return self._content


class Wholes:
    """Parts of which so many `processes` have their heads."""

    def __init__(self, processes: int, forget: Callable[[Key], None]):
        self._processes, self._forget = processes, forget
        self._open: OrderedDict[Named, dict[int, object]] = OrderedDict()

    def have(self, rank: int, lane: str, part: Parts) -> Parts | None:
        """Process `rank` has its heads, `part.staged` is what of them is here; None there: they came damaged.

        The part for the lane to take in, empty where any process has none; None: not all have said so.
        """
        key = key_of(part)
        named = lane, key
        if named not in self._open:
            for _, old in forget_older(self._open, named):
                self._forget(old)
        there = self._open.setdefault(named, {})
        there[rank] = part.staged
        if part.staged is None:
            del self._open[named]
            self._forget(key)
            return part
        if len(there) < self._processes:
            if len(self._open) > MOST:
                (_, old), _ = self._open.popitem(last=False)
                self._forget(old)
            return None
        del self._open[named]
        alone = self._processes == 1
        return part._replace(staged=there[0] if alone else Arrived(key, there[0], self._forget))


def key_of(part: Parts) -> Key:
    return Key(part.handoff, part.generation, part.first)


def forget_older(found: OrderedDict[Named, object], named: Named) -> list[Named]:  # type: ignore[type-arg]
    """Take out what came of earlier askings of the same handoff; what that was."""
    lane, key = named
    old = [
        (name, other)
        for name, other in found
        if name == lane and other.handoff == key.handoff and other.generation < key.generation
    ]
    for each in old:
        del found[each]
    return old


def joined(pieces: list[Heads]) -> Heads:
    """The heads of all pieces, in order."""
    if len(pieces) == 1:
        return pieces[0]
    pieces = sorted(pieces, key=lambda piece: piece.first_head)
    arrays = (np.concatenate([piece[which] for piece in pieces]) for which in range(2))
    return Heads(*arrays, pieces[0].first_head)
