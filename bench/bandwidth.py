"""How fast this machine reads memory right now: the floor of whatever must read all weights once.

A buffer as large as the weights is read by as many threads as the step has, each a part of its own, by the fastest
of a few numpy reductions. A buffer that fits the caches is read from there, as the weights are.
"""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

PIECE_BYTES = 1 << 20
READERS: tuple[Callable[[np.ndarray], object], ...] = (
    lambda words: np.bitwise_or.reduce(words.view(np.uint64)),
    lambda words: np.add.reduce(words.view(np.int64)),
    lambda words: np.maximum.reduce(words.view(np.float32)),
)


class Reader:
    """Reads `num_bytes` of memory with `threads` threads, again and again."""

    def __init__(self, num_bytes: int, threads: int):
        count = max(num_bytes // threads // 8, 1)
        self._parts = [np.ones(count, np.uint64) for _ in range(threads)]
        self.num_bytes = count * 8 * threads
        self._pool = ThreadPoolExecutor(threads)
        self._read = min(READERS, key=lambda read: min(self._timed(read) for _ in range(5)))

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def seconds(self) -> float:
        """Of one reading of all of it."""
        return self._timed(self._read)

    def _timed(self, read: Callable[[np.ndarray], object]) -> float:
        began = time.perf_counter()
        list(self._pool.map(lambda part: _in_pieces(read, part), self._parts))
        return time.perf_counter() - began


def _in_pieces(read: Callable[[np.ndarray], object], part: np.ndarray) -> None:
    step = PIECE_BYTES // 8
    for start in range(0, len(part), step):
        read(part[start : start + step])
