"""What waits for a peer: in order, bounded, whoever fills it."""

import random
import threading

from engine.movers.outgoing import BATCH, Outgoing


def test_what_is_put_is_taken_in_order_and_in_batches():
    waiting = Outgoing(1000)
    assert all(waiting.put(number, 30) for number in range(10))
    assert waiting.take(100) == ([0, 1, 2], 90)
    assert waiting.take(10) == ([3], 30), "at least one goes"
    for number in range(BATCH + 5):
        waiting.put(number, 0)
    assert len(waiting.take(1 << 20)[0]) == BATCH
    assert waiting and waiting.clear() == 6 + 5 and not waiting and waiting.take(100) == ([], 0)


def test_what_is_being_sent_still_counts():
    waiting = Outgoing(100)
    assert waiting.put("a", 60) and not waiting.put("b", 60)
    _, size = waiting.take(1000)
    assert not waiting.put("b", 60)
    waiting.sent(size)
    assert waiting.put("b", 60) and waiting.num_bytes == 60
    waiting.clear()
    assert waiting.num_bytes == 0


def test_what_is_larger_than_all_room_goes_alone():
    waiting = Outgoing(100)
    assert waiting.put("large", 500) and not waiting.put("small", 1)
    waiting.sent(waiting.take(1)[1])
    assert waiting.put("small", 1) and not waiting.put("large", 500)


def test_threads_that_put_while_others_take_lose_and_overfill_nothing():
    waiting, put, taken, over = Outgoing(1000), [], [], threading.Event()

    def fill(seed):
        rng = random.Random(seed)
        for number in range(2000):
            size = rng.randint(1, 50)
            if waiting.put((seed, number), size):
                put.append((seed, number))
            assert waiting.num_bytes <= 1000

    def drain():
        while not over.is_set() or waiting:
            items, size = waiting.take(200)
            taken.extend(items)
            waiting.sent(size)

    threads = [threading.Thread(target=fill, args=(seed,)) for seed in range(4)]
    drainer = threading.Thread(target=drain)
    for thread in (drainer, *threads):
        thread.start()
    for thread in threads:
        thread.join()
    over.set()
    drainer.join()
    assert sorted(taken) == sorted(put) and waiting.num_bytes == 0
    for seed in range(4):
        mine = [number for which, number in taken if which == seed]
        assert mine == sorted(mine)
