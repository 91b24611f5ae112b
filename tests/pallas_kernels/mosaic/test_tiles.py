"""The work list of query tiles: each token in one tile, the longest first."""

import numpy as np
import pytest

from pallas_kernels.mosaic.tiles import BOX, list_tiles, places
from pallas_kernels.rows import Rows


def draw(rng, padding):
    counts = rng.choice([0, 1, 2, 7, 16, 40], size=rng.integers(1, 6))
    starts = rng.integers(0, 200, size=len(counts))
    rows = Rows(np.cumsum(counts) - counts, starts, counts, np.zeros((len(counts), 1)))
    return Rows(*(np.asarray(part, np.int32) for part in rows)), int(counts.sum()) + padding


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("window", [None, 20])
def test_every_token_of_a_row_is_in_one_tile_that_meets_all_it_sees(seed, window):
    rng = np.random.default_rng(seed)
    t, s = [8, 16, 32][seed % 3], 16
    rows, T = draw(rng, padding=t)
    T += -T % BOX
    tiles = list_tiles(rows, T, t, s, window)
    tile_T, place_T = places(rows, tiles, T, t)
    owner_T = np.full(T, -1)
    live = int(tiles.total[0])
    assert (np.asarray(tiles.count)[live:] == 0).all()
    for w in range(live):
        row, token, low, high, first, count, place, begin, end = (int(column[w]) for column in tiles[:-1])
        assert 0 <= token <= T - t and 0 <= low < high <= t and token % BOX == 0
        mine = np.arange(token + low, token + high)
        assert (owner_T[mine] == -1).all()
        owner_T[mine] = w
        positions = rows.start_B[row] + mine - rows.first_B[row]
        assert place + low + first * s == positions[0]
        seen = 0 if window is None else max(positions[0] - window + 1, 0)
        assert begin == seen - first * s and 0 <= begin < s
        assert first + count == positions[-1] // s + 1
        assert end + first * s == rows.start_B[row] + rows.count_B[row]
        assert (np.asarray(tile_T)[mine] == w).all() and (np.asarray(place_T)[mine] == mine - token).all()
    assert (owner_T >= 0).sum() == rows.count_B.sum()


def test_longer_rows_and_later_tiles_come_first():
    rows = Rows(*(np.array(part, np.int32) for part in ([0, 10, 12], [0, 500, 90], [10, 2, 20])), None)
    tiles = list_tiles(rows, 40, 8, 16, None)
    assert np.asarray(tiles.row)[:6].tolist() == [1, 2, 2, 2, 0, 0]
    assert np.asarray(tiles.token)[:6].tolist() == [8, 24, 16, 8, 8, 0]
