"""What quantised weights stand for, in float64, number by number: written apart from what it judges."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from pallas_kernels.quantised import GROUP, PerColumn


def stands_for(w):
    """The weights of a PerColumn or Grouped, [D, X]."""
    if isinstance(w, PerColumn):
        numbers = np.asarray(w.numbers_XD).view(np.uint8)
        table = np.arange(256, dtype=np.uint8)
        table = table.view(ml_dtypes.float8_e4m3fn if w.numbers_XD.dtype == jnp.float8_e4m3fn else np.int8)
        return (table.astype(np.float64)[numbers] * np.asarray(w.scales_X, np.float64)[:, None]).T
    signed = [*range(8), *range(-8, 0)]
    out_DX, scales_DX = np.zeros(w.shape), np.asarray(w.scales_DX, np.float64)
    for x, column in enumerate(np.asarray(w.pairs_XD).view(np.uint8)):
        for j, byte in enumerate(column):
            for d, bits in ((2 * j, byte % 16), (2 * j + 1, byte // 16)):
                out_DX[d, x] = signed[bits] * scales_DX[d // GROUP, x]
    return out_DX


def drawn(T, D, X, seed=0):
    """Normal tokens [T, D] and weights [D, X], float32."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(T, D)).astype(np.float32), rng.normal(size=(D, X)).astype(np.float32)
