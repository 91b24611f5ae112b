"""Attention and the writing of blocks in float64 NumPy, one loop per token: written apart from what it judges."""

import numpy as np


def attention(q_TNH, k_PKCH, v_PKCH, rows, *, base, scale, window, soft_cap=None, sinks_N=None):
    """Loops over rows, tokens, heads and positions; reads nothing beyond the positions a token may see."""
    shared = {"base": base, "scale": scale, "window": window, "soft_cap": soft_cap, "sinks_N": sinks_N}
    return attention_with_lse(q_TNH, k_PKCH, v_PKCH, rows, **shared)[0]


def attention_with_lse(q_TNH, k_PKCH, v_PKCH, rows, *, base, scale, window, soft_cap=None, sinks_N=None):
    """Outputs [T, N, H] and the log of each softmax's mass [T, N], its sink included; 0 and -inf for padding."""
    T, N, H = q_TNH.shape
    _, K, C, _ = k_PKCH.shape
    first_B, start_B, count_B, table_BM = (np.asarray(part) for part in rows)
    out_TNH = np.zeros((T, N, H), np.float64)
    lse_TN = np.full((T, N), -np.inf)
    for b in range(len(first_B)):
        for i in range(count_B[b]):
            t, last = first_B[b] + i, start_B[b] + i
            begin = 0 if window is None else max(0, last - window + 1)
            where = [(base + table_BM[b, p // C], p % C) for p in range(begin, last + 1)]
            for n in range(N):
                head = n // (N // K)
                keys = np.stack([k_PKCH[block, head, c].astype(np.float64) for block, c in where])
                values = np.stack([v_PKCH[block, head, c].astype(np.float64) for block, c in where])
                scores = scale * keys @ q_TNH[t, n].astype(np.float64)
                if soft_cap is not None:
                    scores = soft_cap * np.tanh(scores / soft_cap)
                sink = [] if sinks_N is None else [float(sinks_N[n])]
                top = max([scores.max(), *sink])
                weights = np.exp(scores - top)
                mass = weights.sum() + sum(np.exp(s - top) for s in sink)
                out_TNH[t, n] = weights @ values / mass
                lse_TN[t, n] = top + np.log(mass)
    return out_TNH, lse_TN


def write_kv(k_PKCH, v_PKCH, k_TKH, v_TKH, slots_T, offsets_T):
    """Returns new pools; tokens whose slot is at or past the pool's end are dropped."""
    k_PKCH, v_PKCH = k_PKCH.copy(), v_PKCH.copy()
    for t, (slot, offset) in enumerate(zip(slots_T, offsets_T, strict=True)):
        if slot < len(k_PKCH):
            k_PKCH[slot, :, offset] = k_TKH[t]
            v_PKCH[slot, :, offset] = v_TKH[t]
    return k_PKCH, v_PKCH
