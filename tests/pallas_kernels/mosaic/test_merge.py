"""The merge of items, interpreted, against float64; what dead items hold is NaN."""

import jax
import numpy as np
import pytest

from pallas_kernels.mosaic.merge import merge
from pallas_kernels.work import Work
from tests.pallas_kernels.mosaic.interpreting import interpreted


def expected(totals_IKHg, stats_IKSg, first_B, items_B, sinks_N, N):
    _, K, H, _ = totals_IKHg.shape
    o_BNH, lse_BN = np.zeros((len(first_B), N, H)), np.full((len(first_B), N), -np.inf)
    for b, (first, count) in enumerate(zip(first_B, items_B, strict=True)):
        for n in range(N if count else 0):
            head, at = n // (N // K), n % (N // K)
            top_I, mass_I = stats_IKSg[first : first + count, head, :, at].astype(np.float64).T
            share_I = np.exp2(top_I)
            mass = share_I @ mass_I + (0 if sinks_N is None else np.exp(np.float64(sinks_N[n])))
            o_BNH[b, n] = share_I @ totals_IKHg[first : first + count, head, :, at] / mass
            lse_BN[b, n] = np.log(mass)
    return o_BNH, lse_BN


@pytest.mark.parametrize(
    "counts, N, K, H, sinks", [([3, 0, 1], 3, 1, 80, True), ([19, 2], 4, 2, 64, False), ([5], 9, 1, 256, True)]
)
def test_items_of_a_row_are_merged_by_their_masses(counts, N, K, H, sinks):
    rng = np.random.default_rng(0)
    g, items_B = -(-N // K // 8) * 8, np.array(counts, np.int32)
    first_B = (np.cumsum(items_B) - items_B).astype(np.int32)
    totals_IKHg = rng.normal(size=(sum(counts) + 2, K, H, g)).astype(np.float32)
    stats_IKSg = rng.uniform(0.5, 9, size=(sum(counts) + 2, K, 2, g)).astype(np.float32)
    totals_IKHg[-2:] = stats_IKSg[-2:] = np.nan
    sinks_N = rng.normal(size=N).astype(np.float32) if sinks else None
    nothing = np.zeros(1, np.int32)
    work = Work(*[nothing] * 4, first_B, items_B)
    with interpreted(races=True):
        o_BNH, lse_BN = jax.jit(lambda *arrays: merge(*arrays, num_heads=N, dtype=np.float32))(
            totals_IKHg, stats_IKSg, work, sinks_N
        )
    o_ref_BNH, lse_ref_BN = expected(totals_IKHg, stats_IKSg, first_B, items_B, sinks_N, N)
    np.testing.assert_allclose(o_BNH, o_ref_BNH, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(lse_BN, lse_ref_BN, rtol=1e-6)
