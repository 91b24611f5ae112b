"""Published blocks as the events of the contract, one numbered stream for each subscriber.

    snapshot: chunk 1 of k, clear first ... chunk k -> batch -> batch ...     numbers without a gap

A stream begins behind the number that its subscriber names, and always with all that is stored: so whoever comes
back after a break is exact again whatever it missed. A block's hash is the first 8 bytes of its key, a chain of
sha256 (engine/core/prefix.py). Cost: a few us a block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from engine.core.blocks import Content
from engine.serve.vllm_engine.stubs import common_pb2 as pb

BATCH_BLOCKS = 512  # most in one message
News = tuple[bytes, Content | None]


def block_hash(key: bytes) -> int:
    """The first 8 bytes, as a signed number."""
    return int.from_bytes(key[:8], "big", signed=True)


class Events:
    """The messages of one stream. `after` is the last number that the subscriber knows."""

    def __init__(self, after: int):
        self._number, self._event = after, 0

    def snapshot(self, contents: Sequence[Content], now: float) -> Iterator[pb.KvEventBatch]:
        """All that is stored, each block after the one before it; at least one message."""
        count = max(-(-len(contents) // BATCH_BLOCKS), 1)
        for index in range(count):
            part = contents[index * BATCH_BLOCKS : (index + 1) * BATCH_BLOCKS]
            chunk = pb.KvSnapshotChunk(index=index, count=count, blocks=len(contents))
            clear = [pb.KvCacheEvent(cleared=pb.KvCacheCleared())] if index == 0 else []
            stored = written([(content.key, content) for content in part])
            yield self._batch([*clear, *stored], now, snapshot=chunk)

    def changes(self, news: Sequence[News], now: float) -> Iterator[pb.KvEventBatch]:
        """What was stored and dropped, in order."""
        for first in range(0, len(news), BATCH_BLOCKS):
            batch = self._batch(written(news[first : first + BATCH_BLOCKS]), now)
            for event in batch.events:
                self._event += 1
                event.event_id = self._event
            yield batch

    def _batch(
        self, events: Sequence[pb.KvCacheEvent], now: float, snapshot: pb.KvSnapshotChunk | None = None
    ) -> pb.KvEventBatch:
        self._number += 1
        return pb.KvEventBatch(
            sequence_number=self._number, timestamp=now, events=events, dp_rank=0, snapshot=snapshot
        )


def written(news: Sequence[News]) -> list[pb.KvCacheEvent]:
    """Events of changes: blocks that follow each other are stored together, those dropped in a row are together."""
    events: list[pb.KvCacheEvent] = []
    last: bytes | None = None  # the key of the block that was stored just before
    for key, content in news:
        if content is None:
            if not events or not events[-1].HasField("removed"):
                events.append(pb.KvCacheEvent(removed=pb.KvBlocksRemoved()))
            events[-1].removed.block_hashes.append(block_hash(key))
            last = None
            continue
        if last is None or content.parent != last:
            events.append(pb.KvCacheEvent(stored=pb.KvBlocksStored()))
            if content.parent != content.start:
                events[-1].stored.parent_block_hash = block_hash(content.parent)
        tokens = memoryview(content.tokens).cast("i").tolist()
        events[-1].stored.blocks.add(block_hash=block_hash(key), token_ids=tokens, block_size=len(tokens))
        last = key
    return events
