"""Who holds which KV block, and which idle blocks still answer for a prefix.

Blocks are integers here; `engine/runner` owns the arrays they index. A block moves only so:

    free --take--> held --drop to 0 references--> cached if it was published, else free
                    ^-----------share------------ cached --evict, oldest first--> free
                   held --begin_write--> writing --end_write--> held      KV comes from another lane: neither
                                                                          published nor freed before the end

Block 0 is the sink that padded rows read and write; it is never handed out.
Every method costs O(blocks it names). Source: PagedAttention (Kwon et al., SOSP 2023), section 4.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from engine.errors import OutOfBlocks


@dataclass(frozen=True, slots=True)
class Content:
    """What a published block holds: the key of its whole prefix, and its own tokens to compare on a hit.

    parent  the key of the block before it; of the first block, where the chain starts
    start   where the chain starts: another for every adapter and salt
    """

    key: bytes
    tokens: bytes
    parent: bytes = b""
    start: bytes = b""


News = tuple[bytes, Content | None]  # a key that is published now, or not any more


class BlockPool:
    """Reference counts, free list and prefix cache of one lane's pool."""

    def __init__(self, num_blocks: int):
        self._refs = [0] * num_blocks
        self._free = list(range(num_blocks - 1, 0, -1))  # popped from the end: low numbers first
        self._cached: OrderedDict[int, None] = OrderedDict()  # published, no references; oldest first
        self._block_of: dict[bytes, int] = {}
        self._content_of: dict[int, Content] = {}
        self._writing: set[int] = set()
        self.news: list[News] | None = None  # what was published and unpublished, while somebody asks for it

    @property
    def published(self) -> list[Content]:
        """What `share` can find."""
        return list(self._content_of.values())

    @property
    def available(self) -> int:
        """Blocks that `take` could hand out now: free and cached."""
        return len(self._free) + len(self._cached)

    @property
    def usable(self) -> int:
        """Blocks that can ever be handed out."""
        return len(self._refs) - 1

    @property
    def writing(self) -> int:
        """Blocks that another lane's KV is on its way to."""
        return len(self._writing)

    @property
    def cached(self) -> int:
        """Published blocks that nobody holds."""
        return len(self._cached)

    def take(self, count: int) -> list[int]:
        """Hand out `count` blocks with one reference each, evicting the oldest cached if it must.

        Raises OutOfBlocks, having changed nothing, when fewer than `count` are available.
        """
        if count > self.available:
            raise OutOfBlocks(f"wanted {count} KV blocks, {self.available} of {self.usable} available")
        blocks = [self._free.pop() if self._free else self._evict() for _ in range(count)]
        for block in blocks:
            self._refs[block] = 1
        return blocks

    def share(self, prefix: Sequence[Content]) -> list[int]:
        """Reference and return the blocks of the longest published prefix of `prefix`."""
        blocks = []
        for content in prefix:
            block = self._block_of.get(content.key)
            if block is None or self._content_of[block].tokens != content.tokens:
                break
            self._cached.pop(block, None)
            self._refs[block] += 1
            blocks.append(block)
        return blocks

    def begin_write(self, blocks: Iterable[int]) -> None:
        """Mark taken blocks as written from outside this lane's steps."""
        self._writing.update(blocks)

    def end_write(self, blocks: Iterable[int]) -> None:
        """Nothing can write `blocks` from outside any more."""
        self._writing.difference_update(blocks)

    def publish(self, block: int, content: Content) -> None:
        """Let `share` find `block`; call it once the device has written the whole block.

        The first of two equal blocks wins and the other stays private: tables are append-only.
        """
        assert block not in self._writing, "published while it is written"
        if content.key not in self._block_of and block not in self._content_of:
            self._block_of[content.key], self._content_of[block] = block, content
            if self.news is not None:
                self.news.append((content.key, content))

    def forget(self, blocks: Iterable[int]) -> None:
        """Unpublish `blocks`: what they hold is in doubt. Holders keep them."""
        for block in blocks:
            if block in self._content_of:
                self._unpublish(block)
                if block in self._cached:
                    del self._cached[block]
                    self._free.append(block)

    def forget_all(self) -> None:
        """Unpublish everything."""
        self.forget(list(self._content_of))

    def drop(self, blocks: Sequence[int]) -> None:
        """Give back one reference to each block, tail first, so that a prefix outlives its suffix."""
        assert self._writing.isdisjoint(blocks), "freed while it is written"
        for block in reversed(blocks):
            self._refs[block] -= 1
            if self._refs[block] == 0 and block in self._content_of:
                self._cached[block] = None
            elif self._refs[block] == 0:
                self._free.append(block)

    def _evict(self) -> int:
        block, _ = self._cached.popitem(last=False)
        self._unpublish(block)
        return block

    def _unpublish(self, block: int) -> None:
        key = self._content_of.pop(block).key
        del self._block_of[key]
        if self.news is not None:
            self.news.append((key, None))

    def check(self, holds: Sequence[int] | None = None) -> None:
        """Assert that every block is in exactly one state and, given all `holds`, that references match them.

        O(pool); for tests and idle moments.
        """
        held = [block for block, refs in enumerate(self._refs) if refs > 0]
        assert sorted(held + self._free + list(self._cached)) == list(range(1, len(self._refs)))
        assert self._writing <= set(held)
        assert set(self._cached) <= self._content_of.keys() and not self._content_of.keys() & set(self._free)
        assert {content.key: block for block, content in self._content_of.items()} == self._block_of
        if holds is not None:
            counts = [0] * len(self._refs)
            for block in holds:
                counts[block] += 1
            assert counts == self._refs, "references do not match the tables"
