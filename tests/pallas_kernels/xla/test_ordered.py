"""The invariant mode: one sequence, one set of bits."""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from pallas_kernels import dispatch
from pallas_kernels.dispatch import Rows
from tests.pallas_kernels import ref64, scenes

LENGTH = 150  # positions of the sequence under test
T, B, M = 160, 4, 12  # one padding for every step of this file, so that most share a compilation


@functools.partial(jax.jit, static_argnames=("window", "one_token"))
def step(q_TNH, k_PKCH, v_PKCH, rows, base, *, window=None, one_token=False):
    return dispatch.attention(
        q_TNH, k_PKCH, v_PKCH, rows, base=base, scale=0.2, window=window, numerics="invariant", one_token=one_token
    )


class Sequence:
    """Random queries, keys and values of one sequence, to be laid out in any step."""

    def __init__(self, rng, *, N=8, K=2, H=32, dtype="float32"):
        self.q_SNH = rng.normal(size=(LENGTH, N, H)).astype(np.float32)
        self.k_SKH, self.v_SKH = (rng.normal(size=(LENGTH, K, H)).astype(np.float32) for _ in range(2))
        self.rng = rng

    def lay(
        self, spans, mates=(), *, C=16, num_blocks=64, heads=slice(None), kv_heads=slice(None), tokens=T, rows=B
    ):
        """One step: a row (start, count) of the sequence for each span, after rows of strangers (start, count)."""
        q_SNH, k_SKH, v_SKH = self.q_SNH[:, heads], self.k_SKH[:, kv_heads], self.v_SKH[:, kv_heads]
        K, H = k_SKH.shape[1:]
        k_PKCH = self.rng.normal(size=(num_blocks, K, C, H)).astype(np.float32)
        v_PKCH = self.rng.normal(size=(num_blocks, K, C, H)).astype(np.float32)
        names = iter(1 + self.rng.permutation(num_blocks - 1))
        lines = [*mates, *spans]
        table_BM = np.zeros((rows, M * 16 // min(C, 16)), np.int32)
        q_TNH = self.rng.normal(size=(tokens, q_SNH.shape[1], H)).astype(np.float32)
        starts, counts = (np.zeros(rows, np.int32) for _ in range(2))
        for b, (start, count) in enumerate(lines):
            starts[b], counts[b] = start, count
            for m in range(-(-(start + count) // C)):
                table_BM[b, m] = block = next(names)
                if b >= len(mates):
                    part = slice(m * C, min(m * C + C, start + count))
                    size = part.stop - part.start
                    k_PKCH[block], v_PKCH[block] = np.nan, np.nan
                    k_PKCH[block, :, :size] = k_SKH[part].swapaxes(0, 1)
                    v_PKCH[block, :, :size] = v_SKH[part].swapaxes(0, 1)
        firsts = (np.cumsum(counts) - counts).astype(np.int32)
        for b in range(len(mates), len(lines)):
            q_TNH[firsts[b] : firsts[b] + counts[b]] = q_SNH[starts[b] : starts[b] + counts[b]]
        return q_TNH, k_PKCH, v_PKCH, Rows(firsts, starts, counts, table_BM), len(mates)

    def run(self, start, count, mates=(), window=None, one_token=False, **layout):
        """[count, N, H] of the tokens start..start + count - 1."""
        q_TNH, k_PKCH, v_PKCH, rows, b = self.lay([(start, count)], mates, **layout)
        o_TNH = np.asarray(step(q_TNH, k_PKCH, v_PKCH, rows, 0, window=window, one_token=one_token))
        owned = np.zeros(len(o_TNH), bool)
        owned[: rows.count_B.sum()] = True
        assert not o_TNH[~owned].any()
        return o_TNH[rows.first_B[b] : rows.first_B[b] + count]


@pytest.mark.parametrize("window", [None, 40])
def test_the_invariant_mode_agrees_with_float64(window):
    sequence = Sequence(np.random.default_rng(0))
    q_TNH, k_PKCH, v_PKCH, rows, _ = sequence.lay([(0, 70), (149, 1), (61, 9)])
    o_TNH = step(q_TNH, k_PKCH, v_PKCH, rows, 0, window=window)
    ref_TNH = ref64.attention(q_TNH, k_PKCH, v_PKCH, rows, base=0, scale=0.2, window=window)
    assert scenes.relative_error(o_TNH, ref_TNH) <= 1e-5


@pytest.mark.parametrize("window", [None, 40])
def test_a_prompt_cut_into_any_chunks_gives_the_same_bits(window):
    rng = np.random.default_rng(1)
    sequence = Sequence(rng)
    whole_SNH = sequence.run(0, LENGTH, window=window)
    for _ in range(12):
        cuts = sorted({0, LENGTH, *rng.integers(1, LENGTH, size=rng.integers(1, 8))})
        parts = [sequence.run(a, b - a, window=window) for a, b in zip(cuts, cuts[1:], strict=False)]
        np.testing.assert_array_equal(np.concatenate(parts), whole_SNH)


def test_decoding_token_by_token_gives_the_bits_of_the_whole_prompt():
    sequence = Sequence(np.random.default_rng(2))
    whole_SNH = sequence.run(0, LENGTH)
    for position in [0, 1, 7, 8, 63, 64, 65, 127, 128, LENGTH - 1]:
        alone = sequence.run(position, 1, tokens=B, one_token=True)
        np.testing.assert_array_equal(alone[0], whole_SNH[position])


def test_strangers_in_the_step_change_no_bit():
    rng = np.random.default_rng(3)
    sequence = Sequence(rng)
    whole_SNH = sequence.run(0, LENGTH)
    for mates in ([(0, 1)], [(33, 1), (0, 7)], [(90, 9), (0, 1), (12, 30)]):
        for start, count in ((60, 20), (LENGTH - 1, 1)):
            np.testing.assert_array_equal(sequence.run(start, count, mates), whole_SNH[start : start + count])
    many = sequence.run(100, 40, [(5, 1)] * 6, tokens=64, rows=9)
    np.testing.assert_array_equal(many, whole_SNH[100:140])


@pytest.mark.parametrize("H", [32, 128])
def test_heads_on_other_devices_change_no_bit(H):
    sequence = Sequence(np.random.default_rng(4), N=8, K=8, H=H)
    arrays = sequence.lay([(20, 130)])[:4]
    pools, heads = P(None, "tp"), P(None, "tp")

    def sharded(tp):
        mesh = Mesh(np.array(jax.devices()[:tp]), ("tp",))
        local = functools.partial(step, base=0)
        specs = (heads, pools, pools, Rows(P(), P(), P(), P()))
        return jax.jit(jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=heads, check_vma=False))

    whole_TNH = np.asarray(sharded(1)(*arrays))
    for tp in (2, 4, 8):
        np.testing.assert_array_equal(np.asarray(sharded(tp)(*arrays)), whole_TNH)


def test_a_kv_head_repeated_on_several_devices_changes_no_bit():
    sequence = Sequence(np.random.default_rng(4), N=8, K=2)
    whole_SNH = sequence.run(0, LENGTH)
    for head in (0, 3, 6):
        part_SNH = sequence.run(0, LENGTH, heads=slice(head, head + 1), kv_heads=slice(head // 4, head // 4 + 1))
        np.testing.assert_array_equal(part_SNH[:, 0], whole_SNH[:, head])


@pytest.mark.parametrize("C, num_blocks", [(32, 33), (64, 20), (128, 5)])
def test_other_blocks_and_pools_change_no_bit(C, num_blocks):
    sequence = Sequence(np.random.default_rng(5))
    whole_SNH = sequence.run(0, LENGTH)
    np.testing.assert_array_equal(sequence.run(70, 80, C=C, num_blocks=num_blocks), whole_SNH[70:])


def test_blocks_that_do_not_fit_the_tiles_are_refused():
    sequence = Sequence(np.random.default_rng(6))
    with pytest.raises(ValueError, match="got 48; expected a divisor or a multiple of 64"):
        sequence.run(0, 9, C=48)
