"""Decides where a text ends: at the first stop string that it completes.

For each stop string the matcher keeps how many of its leading characters the text now ends with (Knuth, Morris and
Pratt, 1977). The longest of these is held back, since it may become a stop string; the rest is safe to show.

    text so far   def f():\\n    return x\\n|\\nde     stop "\\n\\ndef": 4 characters held back
                  `------- shown --------' held

The first stop string to be completed wins; of two completed by the same character, the longer. So the outcome is a
function of the text alone, however it was cut into pieces. Cost: O(1) per character and stop string, amortised.
"""

from collections.abc import Sequence


def borders(stop: str) -> list[int]:
    """For each n, the longest proper prefix of stop[:n] that is also its suffix."""
    table = [0, 0]
    for char in stop[1:]:
        length = table[-1]
        while length and stop[length] != char:
            length = table[length]
        table.append(length + (stop[length] == char))
    return table


class StopMatcher:
    """Passes text through until a stop string is complete in what tokens after the first `min_tokens` wrote."""

    def __init__(self, stops: Sequence[str], include_stop: bool = False, min_tokens: int = 0):
        self.matched: str | None = None
        self._stops = [(stop, borders(stop)) for stop in sorted(stops, key=len, reverse=True)]
        self._lengths = [0] * len(self._stops)
        self._include_stop = include_stop
        self._min_tokens = min_tokens
        self._held = ""

    def push(self, text: str, num_tokens: int) -> tuple[str, str | None]:
        """What may be shown now that `text` came, and the stop string that it completed, if it did.

        num_tokens  tokens of the output so far, the one that made `text` included. Text of the first `min_tokens`
                    is shown at once and is no part of a match.
        After a match nothing more is shown.
        """
        if self.matched is not None:
            return "", self.matched
        if not self._stops or num_tokens <= self._min_tokens:
            return text, None
        buffer = self._held + text
        for end, char in enumerate(text, len(self._held) + 1):
            if (stop := self._advance(char)) is not None:
                self.matched, self._held = stop, ""
                return buffer[: end if self._include_stop else end - len(stop)], stop
        shown = len(buffer) - max(self._lengths)
        self._held = buffer[shown:]
        return buffer[:shown], None

    def flush(self) -> str:
        """The text held back, once it is known that none will follow."""
        held, self._held = self._held, ""
        return held

    def _advance(self, char: str) -> str | None:
        for k, (stop, table) in enumerate(self._stops):
            length = self._lengths[k]
            while length and stop[length] != char:
                length = table[length]
            self._lengths[k] = length + (stop[length] == char)
        for (stop, _), length in zip(self._stops, self._lengths, strict=True):
            if length == len(stop):
                return stop
        return None
