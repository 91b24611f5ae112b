"""Which full blocks the lanes of a replica can find by prefix, for whoever asks to be told.

    lane --Blocks--> Directory --(key, content): stored | (key, None): gone--> every Reader, in order

A block counts as stored from the first lane that publishes it to the last that drops it. Blocks under an adapter or
a salt are nobody else's: they are left out. Kept only while somebody reads. Cost: a dict entry a block, and a list
entry a reader and change. Pure: messages come in, changes wait at the readers.
"""

from collections.abc import Callable

from engine.core.blocks import Content, News
from engine.core.messages import Blocks


class Reader:
    """What one reader has not taken yet. `wake` is called when something waits."""

    def __init__(self, wake: Callable[[], None]):
        self.wake = wake
        self._waiting: list[News] = []

    def add(self, news: list[News]) -> None:
        """These come next."""
        self._waiting += news
        self.wake()

    @property
    def waiting(self) -> int:
        """How many changes nobody has taken."""
        return len(self._waiting)

    def take(self) -> list[News]:
        """Everything that waits."""
        taken, self._waiting = self._waiting, []
        return taken


class Directory:
    """The blocks of all lanes together. `start` is where chains without adapter and salt begin."""

    def __init__(self, start: bytes):
        self._start = start
        self._blocks: dict[bytes, Content] = {}  # in the order in which they were stored
        self._holders: dict[bytes, set[str]] = {}  # lanes, by key
        self._readers: list[Reader] = []

    @property
    def read(self) -> bool:
        """Whether anybody reads."""
        return bool(self._readers)

    def open(self, wake: Callable[[], None]) -> tuple[Reader, list[Content]]:
        """A reader, and what is stored now, each block after the one before it."""
        reader = Reader(wake)
        self._readers.append(reader)
        return reader, self._ordered()

    def close(self, reader: Reader) -> None:
        """It reads no more; twice is once."""
        if reader in self._readers:
            self._readers.remove(reader)

    def receive(self, lane: str, message: Blocks) -> None:
        """Take in what a lane says."""
        changes: list[News] = []
        stale = {key for key, holders in self._holders.items() if lane in holders} if message.whole else set()
        for key, content in message.news:
            if content is None:
                self._drop(lane, key, changes)
            elif content.start == self._start:
                stale.discard(key)
                self._store(lane, content, changes)
        for key in stale:
            self._drop(lane, key, changes)
        self._tell(changes)

    def lost(self, lane: str) -> None:
        """The lane is gone with all its blocks."""
        self.receive(lane, Blocks(True, ()))

    def _store(self, lane: str, content: Content, changes: list[News]) -> None:
        holders = self._holders.setdefault(content.key, set())
        if not holders:
            self._blocks[content.key] = content
            changes.append((content.key, content))
        holders.add(lane)

    def _drop(self, lane: str, key: bytes, changes: list[News]) -> None:
        holders = self._holders.get(key, set())
        holders.discard(lane)
        if not holders and self._holders.pop(key, None) is not None:
            del self._blocks[key]
            changes.append((key, None))

    def _tell(self, changes: list[News]) -> None:
        for reader in self._readers if changes else ():
            reader.add(changes)

    def _ordered(self) -> list[Content]:
        """A block that was dropped and stored again may stand after those that follow it; here it does not."""
        ordered: dict[bytes, Content] = {}
        for content in self._blocks.values():
            trail: list[Content] = []
            above: Content | None = content
            while above is not None and above.key not in ordered:
                trail.append(above)
                above = self._blocks.get(above.parent)
            ordered.update((each.key, each) for each in reversed(trail))
        return list(ordered.values())

    def check(self) -> None:
        """Assert that every block has a holder. For tests and idle moments."""
        assert self._blocks.keys() == self._holders.keys() and all(self._holders.values())
