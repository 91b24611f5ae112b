"""Random steps for the tests: rows of any lengths over shuffled blocks, NaN wherever nothing was ever written."""

import ml_dtypes
import numpy as np

from pallas_kernels.pools import Scaled
from pallas_kernels.rows import Rows


def scene(rng, *, spans, N, K, H, C, dtype="float32", padding=(0, 0), num_blocks=None, columns=None):
    """A step that uses the second layer of a pool of two. Returns q_TNH, k_PKCH, v_PKCH, rows, base.

    spans    (start, count) per row; padding: (tokens, rows) appended
    num_blocks, columns: of a layer and of the table, just enough for the spans and some more unless given
    Blocks of a row are drawn without order from the layer's pool. Positions at or past a row's end, unused
    blocks, the sink and all other layers hold NaN. Table entries past a row's end are wild.
    """
    ends = [start + count if count else 0 for start, count in spans]
    used = [-(-end // C) for end in ends]
    num_blocks = num_blocks or 3 + sum(used)
    columns = columns or max([*used, 1]) + 1
    names = iter(1 + rng.permutation(num_blocks - 1))
    table_BM = rng.integers(-(2**31), 2**31, size=(len(spans) + padding[1], columns)).astype(np.int32)
    k_PKCH = np.full((2 * num_blocks, K, C, H), np.nan, np.float32)
    v_PKCH = np.full_like(k_PKCH, np.nan)
    base = num_blocks
    for b, end in enumerate(ends):
        for m in range(used[b]):
            table_BM[b, m] = next(names)
            live = min(C, end - m * C)
            k_PKCH[base + table_BM[b, m], :, :live] = rng.normal(size=(K, live, H))
            v_PKCH[base + table_BM[b, m], :, :live] = rng.normal(size=(K, live, H))
    count_B = np.array([count for _, count in spans] + [0] * padding[1], np.int32)
    start_B = np.array([start for start, _ in spans] + [0] * padding[1], np.int32)
    first_B = (np.cumsum(count_B) - count_B).astype(np.int32)
    q_TNH = rng.normal(size=(count_B.sum() + padding[0], N, H)).astype(np.float32)
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    arrays = (q_TNH.astype(kind), k_PKCH.astype(kind), v_PKCH.astype(kind))
    return *arrays, Rows(first_B, start_B, count_B, table_BM), base


def one_token_scene(rng, *, lengths, padding=0, **shape):
    """A decode step: row b attends `lengths[b]` positions, 0 marks a padded row. T == B, token b is row b's."""
    spans = [(max(length - 1, 0), 1) for length in lengths]
    q_TNH, k_PKCH, v_PKCH, rows, base = scene(rng, spans=spans, **shape)
    count_B = (np.array(lengths) > 0).astype(np.int32)
    return q_TNH, k_PKCH, v_PKCH, rows._replace(count_B=count_B), base


def relative_error(o_TNH, ref_TNH):
    """The largest, over rows of T, of max|o - ref| / max|ref|; rows whose reference is 0 must be 0."""
    o_TNH, ref_TNH = np.asarray(o_TNH, np.float64), np.asarray(ref_TNH, np.float64)
    off_T = np.abs(o_TNH - ref_TNH).max(axis=(1, 2))
    size_T = np.abs(ref_TNH).max(axis=(1, 2))
    return float(
        np.where(size_T > 0, off_T / np.where(size_T > 0, size_T, 1), np.where(off_T == 0, 0, np.inf)).max()
    )


def stored(pool_PKCH):
    """The pool as CPUs hold it: bfloat16 as uint16, anything else unchanged."""
    return pool_PKCH.view(np.uint16) if pool_PKCH.dtype == ml_dtypes.bfloat16 else pool_PKCH


def scaled(k_PKCH, v_PKCH, kind):
    """Both pools in 8 bits, computed apart from `pools.quantise`: keys and values as `Scaled`, and the numbers that
    they stand for, float32 [P, K, C, H]. What is NaN in the pools has a NaN scale, and NaN numbers if it can.
    """
    largest = 127 if kind == "int8" else float(ml_dtypes.finfo(kind).max)
    dtype = np.dtype(getattr(ml_dtypes, kind, kind))
    pools, meant = [], []
    for pool_PKCH in (k_PKCH, v_PKCH):
        pool_PKCH = pool_PKCH.astype(np.float32)
        unwritten_PKC = np.isnan(pool_PKCH[..., 0])
        scales_PKC = np.abs(pool_PKCH).max(axis=-1) / largest
        numbers_PKCH = pool_PKCH / scales_PKC[..., None]
        numbers_PKCH = np.rint(numbers_PKCH) if kind == "int8" else numbers_PKCH
        if kind == "int8":
            numbers_PKCH = np.where(unwritten_PKC[..., None], 77, numbers_PKCH)
        numbers_PKCH = numbers_PKCH.astype(dtype)
        meant.append(numbers_PKCH.astype(np.float32) * scales_PKC[..., None])
        pools.append(Scaled(numbers_PKCH, scales_PKC.astype(np.float32)))
    keys, values = pools
    return keys, values._replace(numbers=np.ascontiguousarray(values.numbers.swapaxes(2, 3))), *meant
