"""Decides which tokens a training step sees: documents joined by <|endoftext|> and cut into windows."""

from collections.abc import Iterator

import numpy as np
from tokenizers import Tokenizer

from engine.embedded.corpus import END_OF_TEXT


def encode(tokenizer: Tokenizer, documents: list[str]) -> np.ndarray:
    """All documents as one stream of int32 tokens, an <|endoftext|> before the first and after each."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    stream = [end]
    for encoding in tokenizer.encode_batch(documents):
        stream += [*encoding.ids, end]
    return np.asarray(stream, np.int32)


def batches(stream: np.ndarray, length: int, num_windows: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Endless batches [num_windows, length + 1]; each pass has another offset and order."""
    while True:
        rows = cut(stream[rng.integers(length) :], length)
        order = rng.permutation(len(rows))
        for start in range(0, len(rows) - num_windows + 1, num_windows):
            yield rows[order[start : start + num_windows]]


def cut(stream: np.ndarray, length: int) -> np.ndarray:
    """Windows [count, length + 1] that share one token with the next; the rest at the end is dropped."""
    starts = np.arange((len(stream) - 1) // length) * length
    return stream[starts[:, None] + np.arange(length + 1)[None, :]]
