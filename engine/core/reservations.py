"""Blocks that a lane keeps for KV on its way here: found by prefix, or taken and being written.

    reserve --> WRITING --written--> owned by a sequence
                   |
                   +----drop-------> free        the holder says when: only once nothing can write them any more

A block that is WRITING belongs to one handoff, cannot be published and cannot become free (engine/core/blocks.py
asserts it). Costs O(blocks named).
"""

from collections.abc import Sequence

from engine.core.blocks import BlockPool, Content


class Reservations:
    """The reserved blocks of one pool, by handoff."""

    def __init__(self, pool: BlockPool):
        self._pool = pool
        self._held: dict[int, tuple[list[int], int]] = {}  # all blocks, and how many of them hold KV already

    def reserve(self, handoff: int, prefix: Sequence[Content], count: int) -> tuple[list[int], int] | None:
        """`count` blocks for `handoff`, the first of them shared where `prefix` is known here, and how many are.

        None, with nothing changed, while the pool has no room.
        """
        assert handoff not in self._held
        shared = self._pool.share(prefix)
        if count - len(shared) > self._pool.available:
            self._pool.drop(shared)
            return None
        taken = self._pool.take(count - len(shared))
        self._pool.begin_write(taken)
        self._held[handoff] = shared + taken, len(shared)
        return shared + taken, len(shared)

    def written(self, handoff: int) -> list[int]:
        """All bytes have landed: the blocks are the caller's to hold."""
        blocks, shared = self._held.pop(handoff)
        self._pool.end_write(blocks[shared:])
        return blocks

    def held(self, handoff: int) -> list[int]:
        """The blocks of `handoff`, in order of position."""
        return self._held[handoff][0]

    def writing(self, handoff: int) -> int:
        """How many blocks of `handoff` may still be written."""
        blocks, shared = self._held.get(handoff, ([], 0))
        return len(blocks) - shared

    def drop(self, handoff: int) -> None:
        """Give the blocks back; nothing may write them any more. Unknown handoffs are ignored."""
        if handoff in self._held:
            self._pool.drop(self.written(handoff))

    @property
    def blocks(self) -> list[int]:
        """Every reserved block, one entry a reference."""
        return [block for blocks, _ in self._held.values() for block in blocks]

    @property
    def handoffs(self) -> set[int]:
        """Those that hold blocks."""
        return set(self._held)
