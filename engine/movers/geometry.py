"""What two lanes must have in common before KV may pass between them: a record that both say first."""

from typing import NamedTuple

import numpy as np

from engine.errors import ConfigError
from engine.movers.fields import Field, group, text, whole

LAYOUT = "keys then values, KLnCH"


class Geometry(NamedTuple):
    """Of a lane's KV. `revision` names the weights, `numerics` what else changes the numbers."""

    layers: int
    kv_heads: int
    head_width: int
    dtype: str
    block_size: int
    revision: str
    numerics: str
    layout: str = LAYOUT

    def shape(self, num_blocks: int, heads: int | None = None) -> tuple[int, int, int, int, int]:
        """K L n C H of the keys of `num_blocks` blocks, and of their values; of all heads, or of so many."""
        return self.kv_heads if heads is None else heads, self.layers, num_blocks, self.block_size, self.head_width

    def numpy_dtype(self) -> np.dtype:
        """Raises ConfigError where numpy does not know it; those beyond numpy's own come with JAX."""
        try:
            return np.dtype(self.dtype)
        except TypeError:
            raise ConfigError(f"dtype: got {self.dtype!r:.64}; expected one that numpy knows") from None

    def difference(self, theirs: "Geometry") -> str:
        """What `theirs` has otherwise, as a sentence; empty where nothing."""
        for name, mine, other in zip(self._fields, self, theirs, strict=True):
            if mine != other:
                return f"geometry: {name} is {other!s:.64} there and {mine!s:.64} here; both need the same"
        return ""


GEOMETRY: Field = group(
    Geometry,
    whole("gl", 1, 1 << 16),
    whole("gk", 1, 1 << 16),
    whole("gh", 1, 1 << 16),
    text("gd", 64),
    whole("gb", 1, 1 << 16),
    text("gr", 512),
    text("gn", 512),
    text("gy", 64),
)
