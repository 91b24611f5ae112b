"""Turns token ids into text piece by piece; the pieces joined are the decoding of the whole.

Two ways, chosen by the tokenizer's decoder:

    byte level   a token is a fixed run of bytes. The bytes go through an incremental UTF-8 decoder, which keeps an
                 unfinished character back and writes U+FFFD for bytes that can no longer become one.
    any other    window decoding: decode(context + pending) without the text of the context, where the context is
                 what was shown last. Byte tokens (<0x..>) and an unfinished character stay pending: the decoder
                 judges a run of them as a whole.

The prompt's last tokens are context: the space before the first word of an answer is kept, and a character that the
prompt left unfinished is finished in the output. Cost: byte level 3 us a token; the other way two short decodes a
step. Source: the offsets of text-generation-inference's streaming, the byte alphabet of GPT-2.
"""

import codecs
import re
from collections.abc import Callable, Sequence
from typing import Protocol

TAIL = 8  # prompt tokens that can matter for what follows: a character has at most 4 bytes
REPLACEMENT = "\ufffd"
BYTE_TOKEN = re.compile("<0x[0-9A-Fa-f]{2}>")


class Detokenizer(Protocol):
    """Ids in, text out."""

    def step(self, ids: Sequence[int]) -> str:
        """The text that these ids add, unfinished characters kept back."""
        ...

    def flush(self) -> str:
        """The text kept back, once no id will follow."""
        ...


def byte_alphabet() -> dict[str, int]:
    """The byte that each character of a byte-level token stands for.

    Printable Latin-1 stands for itself; the other bytes, in order, for the characters from U+0100 on.
    """
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(0x100 + k): byte for k, byte in enumerate(others)}


class ByteTable:
    """The bytes of each token of a byte-level vocabulary; empty for an id that no token has."""

    def __init__(self, token_of: Callable[[int], str | None]):
        self._token_of = token_of
        self._alphabet = byte_alphabet()
        self._known: dict[int, bytes] = {}

    def of(self, token_id: int) -> bytes:
        if (found := self._known.get(token_id)) is None:
            token = self._token_of(token_id) or ""
            try:
                found = bytes([self._alphabet[char] for char in token])
            except KeyError:  # an added token is written out as it is
                found = token.encode()
            self._known[token_id] = found
        return found


class ByteDetokenizer:
    """For tokens that are runs of bytes."""

    def __init__(self, table: ByteTable, hidden: frozenset[int], prompt_ids: Sequence[int]):
        self._table = table
        self._hidden = hidden
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.step(prompt_ids[-TAIL:])

    def step(self, ids: Sequence[int]) -> str:
        return self._decoder.decode(b"".join(self._table.of(i) for i in ids if i not in self._hidden))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class WindowDetokenizer:
    """For every other decoder: `decode` maps ids to text, `token_of` an id to its token or to None."""

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        token_of: Callable[[int], str | None],
        hidden: frozenset[int],
        prompt_ids: Sequence[int],
    ):
        self._decode = decode
        self._token_of = token_of
        self._hidden = hidden
        seen = self._seen(prompt_ids)
        start = max(len(seen) - TAIL, 0)
        while start and self._is_byte(seen[start]):
            start -= 1
        self._context = seen[start:]
        self._pending: list[int] = []
        while self._context and decode(self._context).endswith(REPLACEMENT):
            self._pending.insert(0, self._context.pop())

    def step(self, ids: Sequence[int]) -> str:
        self._pending += self._seen(ids)
        if not self._pending or self._is_byte(self._pending[-1]):
            return ""
        text = self._new_text()
        if not text or text.endswith(REPLACEMENT):
            return ""
        self._context, self._pending = self._pending, []
        return text

    def flush(self) -> str:
        text = self._new_text() if self._pending else ""
        self._context, self._pending = self._context + self._pending, []
        return text

    def _is_byte(self, token_id: int) -> bool:
        return BYTE_TOKEN.fullmatch(self._token_of(token_id) or "") is not None

    def _seen(self, ids: Sequence[int]) -> list[int]:
        return [i for i in ids if i not in self._hidden and self._token_of(i) is not None]

    def _new_text(self) -> str:
        shown = self._decode(self._context) if self._context else ""
        text = self._decode(self._context + self._pending)
        return text[len(shown) :] if text.startswith(shown) else self._decode(self._pending)
