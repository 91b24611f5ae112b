"""Which step programs a lane compiles: a padded shape for every step that can come.

    decode   T = B tokens, every row computes one and draws one
    mixed    T tokens of chunks and decodes together, at most B = min(T, rows) rows and points

Each shape comes plain (greedy or pure temperature) and full (everything else). There are at most 24 programs; the
steps between shapes are wider where more would be needed. The largest always holds the largest step, and padding
costs at most what the next shape is larger. On CPU, where compiling takes seconds of the cores that serve, there
are fewer (`COARSE`).
"""

from typing import NamedTuple

FINE, COARSE = (7, 5), (3, 2)  # most decode shapes, most mixed shapes
SMALLEST_MIXED = 16


class Bucket(NamedTuple):
    """One padded shape: T tokens, B rows and points; `full` samples with every option."""

    tokens: int
    rows: int
    one_token: bool
    full: bool

    def __str__(self) -> str:
        kind = "decode" if self.one_token else "mixed"
        return f"{kind} {self.tokens}x{self.rows} {'full' if self.full else 'plain'}"


def ladder(smallest: int, largest: int, most: int) -> tuple[int, ...]:
    """At most `most` sizes that end with `largest`, each twice or more the one before, none below `smallest`."""
    factor = 2
    while True:
        sizes = [largest]
        while sizes[-1] > smallest and most > 1:
            sizes.append(max(-(-sizes[-1] // factor), smallest))
        if len(sizes) <= most:
            return tuple(sorted(sizes))
        factor *= 2


def buckets(max_rows: int, max_tokens: int, most: tuple[int, int] = FINE) -> tuple[Bucket, ...]:
    """Every bucket of a lane, cheapest first within its kind."""
    decode, mixed = ladder(1, max_rows, most[0]), ladder(min(SMALLEST_MIXED, max_tokens), max_tokens, most[1])
    shapes = [(size, size, True) for size in decode] + [(size, min(size, max_rows), False) for size in mixed]
    return tuple(Bucket(*shape, full) for shape in shapes for full in (False, True))


def fitting(choices: tuple[Bucket, ...], num_tokens: int, num_rows: int, one_token: bool, full: bool) -> Bucket:
    """The cheapest bucket of its kind that holds the step; `choices` have the cheapest of a kind first."""
    for bucket in choices:
        holds = bucket.tokens >= num_tokens and bucket.rows >= num_rows
        if holds and bucket.one_token == one_token and bucket.full == full:
            return bucket
    raise ValueError(f"step of {num_tokens} tokens in {num_rows} rows: larger than every program of its kind")
