import random

import pytest

from engine.core.blocks import BlockPool, Content
from engine.errors import OutOfBlocks

A, AB = Content(b"a", b"1"), Content(b"ab", b"2")


def test_take_more_than_available_changes_nothing():
    pool = BlockPool(4)
    with pytest.raises(OutOfBlocks, match="wanted 4 KV blocks, 3 of 3 available"):
        pool.take(4)
    assert pool.available == 3 and pool.take(3) == [1, 2, 3]


def test_a_prefix_outlives_its_suffix():
    pool = BlockPool(4)
    head, tail = pool.take(2)
    pool.publish(head, A), pool.publish(tail, AB)
    pool.drop([head, tail])
    pool.take(2)  # one free block, then one eviction: the tail
    assert pool.share([A, AB]) == [head]


def test_a_key_that_collides_does_not_hand_out_foreign_content():
    pool = BlockPool(4)
    [block] = pool.take(1)
    pool.publish(block, A)
    assert pool.share([Content(b"a", b"other tokens")]) == [] and pool.share([A]) == [block]


def test_a_forgotten_block_is_not_found_again():
    pool = BlockPool(4)
    held, idle = pool.take(2)
    pool.publish(held, A), pool.publish(idle, AB)
    pool.drop([idle])
    pool.forget([held, idle])
    assert pool.share([A]) == [] and pool.available == 2
    pool.check([held])


@pytest.mark.parametrize("seed", range(20))
def test_a_random_walk_keeps_every_invariant(seed):
    rng, pool, held = random.Random(seed), BlockPool(17), []
    contents = [Content(bytes([k]), bytes([k, k])) for k in range(8)]
    for _ in range(400):
        move = rng.random()
        if move < 0.4 and pool.available >= 3:
            held.append(pool.take(rng.randint(1, 3)))
        elif move < 0.6 and (got := pool.share([rng.choice(contents)])):
            held.append(got)
        elif move < 0.75 and held:
            pool.publish(rng.choice(rng.choice(held)), rng.choice(contents))
        elif move < 0.78 and held:
            pool.forget(rng.choice(held))
        elif held:
            pool.drop(held.pop(rng.randrange(len(held))))
        pool.check([block for blocks in held for block in blocks])
