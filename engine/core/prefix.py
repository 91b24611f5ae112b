"""The name of a prefix: a chain of sha256 over its blocks.

    root = sha256("serac", what decides the bytes of KV: revision, numerics, dtype, layout)
    start = sha256(root, adapter, salt)        key_i = sha256(key_(i-1), tokens of block i)

Only full blocks have keys. The tokens of a block stand beside its key and are compared on a hit, so that even a
collision cannot hand out foreign content. Costs about 1 us a block; run off the step's path.
"""

from collections.abc import Sequence
from hashlib import sha256

import numpy as np

from engine.core.blocks import Content


def digest(*parts: bytes) -> bytes:
    """sha256 over `parts`, each with its length, so that no two lists of parts collide by joining."""
    state = sha256()
    for part in parts:
        state.update(len(part).to_bytes(8, "little"))
        state.update(part)
    return state.digest()


def root(*parts: str) -> bytes:
    """The root of every chain of a lane: all that decides what a block's bytes mean."""
    return digest(b"serac", *(part.encode() for part in parts))


def start(root_key: bytes, adapter: str, salt: bytes) -> bytes:
    """The parent of a request's first block."""
    return digest(root_key, adapter.encode(), salt)


def extend(parent: bytes, chain: Sequence[Content], tokens: np.ndarray, block_size: int) -> list[Content]:
    """`chain` continued over every full block of `tokens` (int32 [length])."""
    contents, key = list(chain), chain[-1].key if chain else parent
    for first in range(len(contents) * block_size, len(tokens) - block_size + 1, block_size):
        block = np.ascontiguousarray(tokens[first : first + block_size], np.int32).tobytes()
        above, key = key, digest(key, block)
        contents.append(Content(key, block, above, parent))
    return contents
