"""Which step programs a lane compiles: a padded shape for every step that can come.

    decode   T = B tokens, every row computes one and draws one
    mixed    T tokens of chunks and decodes together, at most B = min(T, rows) rows and points

Each comes plain (greedy or pure temperature) and full (everything else), so there are twice as many programs as
buckets; `MOST` keeps that at 24. The steps between buckets are wider where more would be needed: the largest bucket
always holds the largest step, and padding costs at most what the next bucket is larger.
"""

from typing import NamedTuple

MOST_DECODE, MOST_MIXED = 7, 5


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
        while sizes[-1] > smallest:
            sizes.append(max(-(-sizes[-1] // factor), smallest))
        if len(sizes) <= most:
            return tuple(sorted(sizes))
        factor *= 2


def buckets(max_rows: int, max_tokens: int) -> tuple[Bucket, ...]:
    """Every bucket of a lane, cheapest first within its kind."""
    decode = [Bucket(size, size, True, full) for size in ladder(1, max_rows, MOST_DECODE) for full in (False, True)]
    mixed = [
        Bucket(size, min(size, max_rows), False, full)
        for size in ladder(min(16, max_tokens), max_tokens, MOST_MIXED)
        for full in (False, True)
    ]
    return (*decode, *mixed)


def fitting(choices: tuple[Bucket, ...], num_tokens: int, num_rows: int, one_token: bool, full: bool) -> Bucket:
    """The cheapest bucket of its kind that holds the step."""
    return min(
        bucket
        for bucket in choices
        if bucket.one_token == one_token and bucket.full == full
        if bucket.tokens >= num_tokens and bucket.rows >= num_rows
    )
