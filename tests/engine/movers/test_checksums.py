import numpy as np
import pytest
from xxhash import xxh3_64_intdigest

from engine.movers.checksums import checksums


def drawn(shape, dtype=np.uint16, seed=0):
    return np.random.default_rng(seed).integers(0, 60000, shape).astype(dtype)


@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
def test_a_checksum_is_of_all_keys_and_then_all_values_of_one_head(dtype):
    keys, values = drawn((3, 2, 4, 8, 16), dtype), drawn((3, 2, 4, 8, 16), dtype, 1)
    found = checksums(keys, values)
    assert found.shape == (3,) and found.dtype == np.uint64
    assert found.tolist() == [xxh3_64_intdigest(keys[k].tobytes() + values[k].tobytes()) for k in range(3)]


def test_any_changed_byte_changes_the_checksum_of_its_head_alone():
    keys, values = drawn((3, 2, 2, 4, 8)), drawn((3, 2, 2, 4, 8), seed=1)
    before = checksums(keys, values)
    for array in (keys, values):
        array[1, 0, 1, 2, 3] ^= 1
        assert (checksums(keys, values) != before).tolist() == [False, True, False]
        array[1, 0, 1, 2, 3] ^= 1


def test_what_changes_places_changes_the_checksum():
    keys, values = drawn((1, 2, 2, 4, 8)), drawn((1, 2, 2, 4, 8), seed=1)
    before = checksums(keys, values)
    assert checksums(values, keys) != before
    for order in (np.s_[:, ::-1], np.s_[:, :, ::-1]):
        assert checksums(keys[order], values[order]) != before


def test_heads_and_blocks_cut_out_of_larger_arrays_have_the_checksums_of_their_copies():
    keys, values = drawn((4, 2, 6, 4, 8)), drawn((4, 2, 6, 4, 8), seed=1)
    for part in (np.s_[1:3], np.s_[:, :, :5], np.s_[3:, :, 2:4], np.s_[:, 1:, ::2], np.s_[:, :, :0]):
        copies = keys[part].copy(), values[part].copy()
        assert np.array_equal(checksums(keys[part], values[part]), checksums(*copies))
    assert np.array_equal(checksums(keys[1:], values[1:]), checksums(keys, values)[1:])
