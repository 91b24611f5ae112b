"""The invariant mode on Hopper, interpreted: one sequence, one set of bits."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.mosaic import ordered
from pallas_kernels.rows import Rows
from pallas_kernels.target import H200
from tests.pallas_kernels import ref64, scenes
from tests.pallas_kernels.mosaic.interpreting import interpreted

LENGTH = 140  # positions of the sequence under test
N, H = 2, 64
T, B, PLACES = (
    160,
    3,
    640,
)  # one padding for every step of this file, so that all with the same blocks are one program


@functools.cache
def program(window):
    target = H200._replace(cores=2)
    return jax.jit(functools.partial(ordered.attend, base=0, scale=0.2, window=window, target=target))


class Sequence:
    """Random queries, keys and values of one sequence, to be laid out in any step."""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)
        self.q_SNH = self.draw(LENGTH, N, H)
        self.k_SKH, self.v_SKH = self.draw(LENGTH, 1, H), self.draw(LENGTH, 1, H)

    def draw(self, *shape):
        return self.rng.normal(size=shape).astype(ml_dtypes.bfloat16)

    def lay(self, start, count, mates, C):
        """A step with a row of the sequence after rows of strangers (start, count)."""
        lines = [*mates, (start, count)]
        starts, counts = (
            np.array([*column] + [0] * (B - len(lines)), np.int32) for column in zip(*lines, strict=True)
        )
        k_PKCH, v_PKCH = self.draw(PLACES // C, 1, C, H), self.draw(PLACES // C, 1, C, H)
        names = iter(self.rng.permutation(PLACES // C))
        table_BM = np.full((B, 192 // C), -7, np.int32)
        for b, (first, size) in enumerate(lines):
            used = -(-(first + size) // C)
            table_BM[b, :used] = [next(names) for _ in range(used)]
        for pool_PKCH, x_SKH in ((k_PKCH, self.k_SKH), (v_PKCH, self.v_SKH)):
            for m, block in enumerate(table_BM[len(mates)][: -(-(start + count) // C)]):
                part_CKH = x_SKH[m * C : min(m * C + C, start + count)]
                pool_PKCH[block] = np.nan
                pool_PKCH[block, :, : len(part_CKH)] = part_CKH.swapaxes(0, 1)
        firsts = (np.cumsum(counts) - counts).astype(np.int32)
        q_TNH = self.draw(T, N, H)
        first = firsts[len(mates)]
        q_TNH[first : first + count] = self.q_SNH[start : start + count]
        return (q_TNH, k_PKCH, v_PKCH, Rows(firsts, starts, counts, table_BM)), first

    def run(self, start, count, mates=(), C=16, window=None):
        """[count, N, H] and masses [count, N] of the tokens start..start + count - 1."""
        step, first = self.lay(start, count, mates, C)
        with interpreted():
            results = program(window)(*jax.tree.map(jnp.asarray, step))
            return [np.asarray(x)[first : first + count] for x in results]

    def whole(self, window=None):
        return self.run(0, LENGTH, window=window)


def same(parts, whole):
    for i in range(2):
        np.testing.assert_array_equal(np.concatenate([part[i] for part in parts]), whole[i])


def test_the_invariant_mode_agrees_with_float64():
    sequence = Sequence(0)
    step, _ = sequence.lay(60, 80, [(0, 64)], 16)
    with interpreted():
        o_TNH, lse_TN = program(None)(*jax.tree.map(jnp.asarray, step))
    assert o_TNH.dtype == np.float32 and not np.asarray(o_TNH)[144:].any()
    assert np.isneginf(np.asarray(lse_TN)[144:]).all()
    assert scenes.relative_error(o_TNH, ref64.attention(*step, base=0, scale=0.2, window=None)) <= 1e-2


@pytest.mark.parametrize("window", [None, 40])
def test_a_prompt_cut_into_chunks_gives_the_same_bits(window):
    sequence = Sequence(1)
    cuts = [0, 5, 69, 70, LENGTH]
    same(
        [sequence.run(a, b - a, window=window) for a, b in zip(cuts, cuts[1:], strict=False)],
        sequence.whole(window),
    )


def test_decoding_token_by_token_gives_the_bits_of_the_whole_prompt():
    sequence = Sequence(2)
    whole = sequence.whole()
    for position in (0, 63, 64, LENGTH - 1):
        same([sequence.run(position, 1)], [x[position : position + 1] for x in whole])


def test_strangers_in_the_step_and_other_blocks_change_no_bit():
    sequence = Sequence(3)
    tail = [x[100:] for x in sequence.whole()]
    for mates in ([(33, 1), (0, 70)], [(90, 9)]):
        same([sequence.run(100, LENGTH - 100, mates)], tail)
    same([sequence.run(100, LENGTH - 100, [(17, 3)], C=64)], tail)
