"""Attention and the writing of blocks in float64 NumPy, one loop per token: written apart from what it judges."""

import numpy as np


def attention(q_TNH, k_PKCH, v_PKCH, rows, *, base, scale, window):
    """Loops over rows, tokens, heads and positions; reads nothing beyond the positions a token may see."""
    T, N, H = q_TNH.shape
    _, K, C, _ = k_PKCH.shape
    first_B, start_B, count_B, table_BM = (np.asarray(part) for part in rows)
    out_TNH = np.zeros((T, N, H), np.float64)
    for b in range(len(first_B)):
        for i in range(count_B[b]):
            last = start_B[b] + i
            begin = 0 if window is None else max(0, last - window + 1)
            positions = range(begin, last + 1)
            where = [(base + table_BM[b, p // C], p % C) for p in positions]
            for n in range(N):
                head = n // (N // K)
                keys = np.stack([k_PKCH[block, head, c].astype(np.float64) for block, c in where])
                values = np.stack([v_PKCH[block, head, c].astype(np.float64) for block, c in where])
                scores = scale * keys @ q_TNH[first_B[b] + i, n].astype(np.float64)
                weights = np.exp(scores - scores.max())
                out_TNH[first_B[b] + i, n] = weights @ values / weights.sum()
    return out_TNH


def write_kv(k_PKCH, v_PKCH, k_TKH, v_TKH, slots_T, offsets_T):
    """Returns new pools; tokens whose slot is at or past the pool's end are dropped."""
    k_PKCH, v_PKCH = k_PKCH.copy(), v_PKCH.copy()
    for t, (slot, offset) in enumerate(zip(slots_T, offsets_T, strict=True)):
        if slot < len(k_PKCH):
            k_PKCH[slot, :, offset] = k_TKH[t]
            v_PKCH[slot, :, offset] = v_TKH[t]
    return k_PKCH, v_PKCH
