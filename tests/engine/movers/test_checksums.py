import numpy as np
import pytest
from xxhash import xxh3_64_intdigest

from engine.movers.checksums import checksums, digests


def drawn(shape, dtype=np.uint16, seed=0):
    return np.random.default_rng(seed).integers(0, 60000, shape).astype(dtype)


@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
def test_a_checksum_is_of_the_keys_and_then_the_values_of_one_tile(dtype):
    keys, values = drawn((2, 3, 4, 8, 16), dtype), drawn((2, 3, 4, 8, 16), dtype, 1)
    found = checksums(keys, values)
    assert found.shape == (2, 3, 4) and found.dtype == np.uint64
    for at in np.ndindex(2, 3, 4):
        assert found[at] == xxh3_64_intdigest(keys[at].tobytes() + values[at].tobytes())


def test_any_changed_byte_changes_the_checksum_of_its_tile_alone():
    keys, values = drawn((2, 2, 2, 4, 8)), drawn((2, 2, 2, 4, 8), seed=1)
    before = checksums(keys, values)
    for array in (keys, values):
        array[1, 0, 1, 2, 3] ^= 1
        assert np.argwhere(checksums(keys, values) != before).tolist() == [[1, 0, 1]]
        array[1, 0, 1, 2, 3] ^= 1


def test_keys_and_values_that_change_places_change_the_checksum():
    keys, values = drawn((1, 1, 1, 4, 8)), drawn((1, 1, 1, 4, 8), seed=1)
    assert checksums(keys, values) != checksums(values, keys)


def test_any_part_has_the_checksums_of_the_whole():
    keys, values = drawn((4, 2, 6, 4, 8)), drawn((4, 2, 6, 4, 8), seed=1)
    whole = checksums(keys, values)
    for part in (np.s_[1:3], np.s_[:, :, :5], np.s_[3:, :, 2:4], np.s_[:, 1:, ::2]):
        assert np.array_equal(checksums(keys[part], values[part]), whole[part])
    assert checksums(keys[:, :, :0], values[:, :, :0]).shape == (4, 2, 0)


def test_a_digest_is_of_all_keys_and_then_all_values_of_one_head():
    keys, values = drawn((3, 2, 4, 8, 16)), drawn((3, 2, 4, 8, 16), seed=1)
    found = digests(keys, values)
    assert found.tolist() == [xxh3_64_intdigest(keys[k].tobytes() + values[k].tobytes()) for k in range(3)]
    assert np.array_equal(digests(keys[1:], values[1:]), found[1:])
    cut = keys[:, :, :3], values[:, :, :3]
    assert np.array_equal(digests(*cut), digests(*(array.copy() for array in cut)))
    values[2, 1, 3, 7, 15] ^= 1
    assert (digests(keys, values) != found).tolist() == [False, False, True]
