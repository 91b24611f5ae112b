import pytest

from sharding.estimate import (
    Collective,
    Decoder,
    Lane,
    block_bytes,
    peak_temporaries,
    pool_blocks,
    step_collectives,
)

DECODER = Decoder(num_layers=3, width=64, ffn=128, heads=8, kv_heads=2, head_width=16, vocab=96)


def lane(tp, **options):
    return Lane(tp, min(tp, 2), 4, 64, **options)


def test_a_block_holds_keys_and_values_of_every_layer_and_local_head():
    assert block_bytes(DECODER, lane(1), 16) == 2 * 3 * 16 * 2 * 16 * 4
    assert block_bytes(DECODER, lane(8), 16) == block_bytes(DECODER, lane(1), 16) // 2, "kv heads are copied past 2"


def test_a_pool_takes_what_fits_and_no_more_than_rows_can_fill():
    assert pool_blocks(1000, 10, sequence_blocks=4, max_rows=8) == 33
    assert pool_blocks(209, 10, sequence_blocks=4, max_rows=8) == 20


def test_a_pool_without_room_for_one_sequence_is_refused_with_what_it_takes():
    with pytest.raises(
        ValueError, match="40 bytes hold 4 blocks of 10 bytes; expected at least 5 blocks, 50 bytes"
    ):
        pool_blocks(40, 10, sequence_blocks=4, max_rows=8)


def test_one_device_sends_nothing():
    assert step_collectives(DECODER, lane(1), 8, 8, full=True) == ()


def test_a_plain_step_sums_twice_a_layer_once_for_the_embedding_and_four_words_a_row():
    assert step_collectives(DECODER, lane(4), tokens=32, rows=8, full=False) == (
        Collective("all-reduce", 2 * 3 + 1 + 3, 7 * 32 * 64 * 4 + 4 * 8 * 4),
    )


def test_a_full_step_gathers_the_logits_of_its_rows():
    assert step_collectives(DECODER, lane(4), tokens=32, rows=8, full=True) == (
        Collective("all-reduce", 7, 7 * 32 * 64 * 4),
        Collective("all-gather", 1, 8 * 96 * 4),
    )


def test_the_invariant_mode_gathers_every_devices_part():
    assert step_collectives(DECODER, lane(4, invariant=True), tokens=32, rows=8, full=True) == (
        Collective("all-reduce", 1, 32 * 64 * 4),
        Collective("all-gather", 7, 6 * 4 * 32 * 64 * 4 + 8 * 96 * 4),
    )


def test_a_ring_sends_a_sum_twice_and_a_gather_once():
    assert Collective("all-reduce", 1, 800).wire_bytes(8) == 1400
    assert Collective("all-gather", 1, 800).wire_bytes(8) == 700


def temporaries(tp, tokens, rows):
    return peak_temporaries(DECODER, lane(tp), tokens, rows)


def test_temporaries_are_those_of_the_layers_or_of_the_sampler():
    few = temporaries(1, 512, 1)
    assert temporaries(1, 512, 2) < 1.01 * few, "a layer decides"
    assert temporaries(1, 1024, 1) > 1.5 * few > 1.5 * temporaries(8, 512, 1)
    many = temporaries(1, 512, 1 << 14)
    assert many == 2 * temporaries(1, 512, 1 << 13) > 3 * few, "the sampler decides"
