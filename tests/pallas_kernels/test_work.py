"""The deal of a decode step: every visible tile once, evenly, and in the fixed cut whatever else is there."""

import itertools

import jax
import numpy as np
import pytest

from pallas_kernels import work


def deal(lengths, **options):
    """As NumPy, after checking what holds for every deal."""
    options = {"window": None, "programs": 6, "most_tiles": 40, "fixed": None, **options}
    dealt = work.deal(np.array(lengths), **options, xp=np)
    check(dealt, lengths, options["window"])
    return dealt


def check(dealt, lengths, window):
    items = [range(*pair) for pair in itertools.pairwise(dealt.bound_X)]
    live = int((dealt.count_I > 0).sum())
    assert [i for one in items for i in one] == list(range(live))  # every item has one program
    assert (dealt.count_I[:live] > 0).all()
    for b, length in enumerate(lengths):
        begin = 0 if window is None else max(0, length - window)
        mine = range(dealt.first_B[b], dealt.first_B[b] + dealt.items_B[b])
        assert (dealt.row_I[mine] == b).all()
        tiles = [dealt.first_I[i] + t for i in mine for t in range(dealt.count_I[i])]
        assert tiles == list(range(begin // 64, -(-length // 64)))


def loads(dealt):
    return [dealt.count_I[begin:end].sum() for begin, end in itertools.pairwise(dealt.bound_X)]


@pytest.mark.parametrize("window", [None, 1, 64, 65, 300])
def test_every_visible_tile_is_dealt_once(window):
    rng = np.random.default_rng(0)
    for _ in range(30):
        lengths = rng.choice([0, 1, 63, 64, 65, 128, 700, 2560], size=rng.integers(1, 9))
        for fixed in (None, 1, 3, 64):
            deal(lengths, window=window, programs=int(rng.integers(1, 12)), fixed=fixed)


def test_a_ragged_step_is_dealt_as_evenly_as_a_uniform_one():
    for lengths in ([2560, 1, 64, 900, 0, 70], [733] * 6):
        dealt = deal(lengths)
        assert max(loads(dealt)) == -(-dealt.count_I.sum() // 6)


def test_the_items_of_a_fixed_cut_do_not_depend_on_other_rows():
    alone, among = deal([1000], fixed=3), deal([70, 0, 1000, 2000], fixed=3)
    mine = slice(among.first_B[2], among.first_B[2] + among.items_B[2])
    live = slice(0, alone.items_B[0])
    assert among.first_I[mine].tolist() == alone.first_I[live].tolist()
    assert among.count_I[mine].tolist() == alone.count_I[live].tolist()


def test_a_step_without_rows_has_no_items():
    dealt = deal([0, 0])
    assert not dealt.count_I.any() and not dealt.items_B.any() and not loads(dealt)[0]


@pytest.mark.parametrize("fixed", [None, 2])
def test_a_device_deals_as_numpy_does(fixed):
    lengths, options = [130, 0, 2000, 64], {"window": 900, "programs": 5, "most_tiles": 40, "fixed": fixed}
    on_device = jax.jit(lambda lengths_B: work.deal(lengths_B, **options))(np.array(lengths, np.int32))
    for part, expected in zip(on_device, deal(lengths, **options), strict=True):
        assert part.dtype == np.int32 and part.tolist() == expected.tolist()
