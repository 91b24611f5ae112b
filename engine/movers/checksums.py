"""Checksums over the content of KV on its way, the same whatever meshes the two lanes have.

    checksums[k] = XXH3-64 of head k: its keys [L, n, C, H], then its values

No split of heads between lanes ever cuts a head. A checksum a block would tell which one came damaged, which nobody
asks: a part is taken or asked for again. It would cost 0.6 us of Python a tile, three times the reading.
Cost (AVX2, one core, bytes in the third cache): 30 GB/s; google-crc32c takes 1.3 to 2.4 times as long.
"""

import numpy as np
from xxhash import xxh3_64


def checksums(keys_KLnCH: np.ndarray, values_KLnCH: np.ndarray) -> np.ndarray:
    """uint64 [K]; heads, layers and blocks may be cut out of larger arrays."""
    found = []
    for keys, values in zip(_lines(keys_KLnCH), _lines(values_KLnCH), strict=True):
        state = xxh3_64()
        for line in (*keys, *values):
            state.update(line)
        found.append(state.intdigest())
    return np.array(found, np.uint64)


def _lines(array_KLnCH: np.ndarray) -> np.ndarray:
    """Bytes [K, 1, L * n * tile] where a head stands together, else [K, L, n * tile]."""
    heads, layers = array_KLnCH.shape[:2]
    lines = 1 if array_KLnCH[0].flags.c_contiguous else layers
    return array_KLnCH.reshape(heads, lines, array_KLnCH[0].size // lines).view(np.uint8)
