"""Which lane has computed which blocks, as far as a front remembers what it sent where.

    chain(request, tokens) -> keys of full blocks --remember--> cached(lane, keys): tokens of the longest prefix

A guess for placing: a lane may have evicted what it once computed. Bounded; cost: one hash a block, one entry a
block and lane.
"""

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from engine.core import prefix
from engine.core.request import Request

REMEMBERED = 1 << 16  # blocks whose lane is remembered


class Whereabouts:
    """Of blocks of `block_size` positions under `root`."""

    def __init__(self, block_size: int, root: bytes):
        self._block_size, self._root = block_size, root
        self._where: OrderedDict[tuple[bytes, str], None] = OrderedDict()

    def chain(self, request: Request, tokens: Sequence[int]) -> list[bytes]:
        """The keys of the full blocks before the last of `tokens`."""
        parent = prefix.start(self._root, request.adapter, request.salt)
        contents = prefix.extend(parent, (), np.array(tokens[:-1], np.int32), self._block_size)
        return [content.key for content in contents]

    def cached(self, lane: str, chain: list[bytes]) -> int:
        """Tokens of the longest prefix that the lane has computed."""
        found = 0
        for key in chain:
            if (key, lane) not in self._where:
                break
            found += 1
        return found * self._block_size

    def remember(self, lane: str, chain: list[bytes]) -> None:
        """The lane has these, or will."""
        for key in chain:
            self._where[key, lane] = None
            self._where.move_to_end((key, lane))
        while len(self._where) > REMEMBERED:
            self._where.popitem(last=False)

    def forget(self) -> None:
        """Nobody has anything."""
        self._where.clear()
