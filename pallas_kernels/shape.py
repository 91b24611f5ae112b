"""The shape of an attention call, as far as the choice of an implementation depends on it."""

from typing import NamedTuple


class Shape(NamedTuple):
    """Sizes on one device."""

    group: int  # query heads of a kv head
    head_width: int
    block: int  # positions
    dtype: str  # of the queries
    pool_dtype: str
    pool_size: int = 0  # numbers of all keys
