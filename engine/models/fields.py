"""Checked reading of the keys of a model's config.json.

Every key is read through one of these methods, so a wrong type, a value out of its domain or an absent key is
refused with the key's name. An absent key takes the default of its architecture, when it has one. JSON's `true` is
no number here, and NaN or infinity (which Python's parser lets in) is none either.
"""

import math
from collections.abc import Mapping

from engine.errors import ModelError, wrong

MOST = 2**31 - 1


class Fields:
    """The keys of one JSON object; `within` is the path of that object in the file, for messages."""

    def __init__(self, values: Mapping[str, object], defaults: Mapping[str, object], within: str = ""):
        self.values = values
        self.defaults = defaults
        self.within = within

    def refuse(self, key: str, got: object, expected: str) -> ModelError:
        """The error to raise; `got` is the value found."""
        return ModelError(wrong(self.within + key, got, expected), field=self.within + key)

    def get(self, key: str, expected: str) -> object:
        """The value as it stands, else the default; raises ModelError when there is neither."""
        if key in self.values:
            return self.values[key]
        if key in self.defaults:
            return self.defaults[key]
        raise self.refuse(key, "nothing (the key is absent)", expected)

    def integer(self, key: str, low: int = 1, high: int = MOST) -> int:
        expected = f"an integer {low}..{high}"
        value = self.get(key, expected)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.refuse(key, value, expected)
        return value

    def optional_integer(self, key: str, low: int = 1, high: int = MOST) -> int | None:
        """As `integer`, and None where the value is null."""
        return None if self.get(key, "an integer or null") is None else self.integer(key, low, high)

    def number(self, key: str, low: float = 0.0, high: float = 1e12) -> float:
        """A finite number above `low` and at most `high`."""
        expected = f"a finite number > {low:g} and <= {high:g}"
        value = self.get(key, expected)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.refuse(key, value, expected)
        if not low < value <= high:
            raise self.refuse(key, value, expected)
        return float(value)

    def flag(self, key: str) -> bool:
        value = self.get(key, "true or false")
        if not isinstance(value, bool):
            raise self.refuse(key, value, "true or false")
        return value

    def only(self, key: str, allowed: object, why: str) -> None:
        """Refuses any value but `allowed`; an absent or null key passes."""
        if (value := self.values.get(key)) is not None and value != allowed:
            raise self.refuse(key, value, f"{allowed} ({why})")
