"""In what order those that wait for a row get one."""

from types import SimpleNamespace

from engine.core.waiting import Waiting


def waiting(count):
    queue, sequences = Waiting(), [SimpleNamespace(blocks=[], computed=0) for _ in range(count)]
    for sequence in sequences:
        queue.append(sequence)
    return queue, sequences


def arrive(queue, sequence, *blocks):
    sequence.blocks, sequence.computed = list(blocks), 4 * len(blocks)
    queue.arrive(sequence)


def test_the_oldest_is_first_and_who_was_preempted_before_it():
    queue, (a, b) = waiting(2)
    assert queue.first is queue.hungry is a and list(queue) == [a, b] and len(queue) == 2
    queue.remove(a)
    queue.insert(a)
    c = SimpleNamespace(blocks=[], computed=0)
    queue.insert(c)
    assert list(queue) == [c, a, b]


def test_who_has_blocks_already_comes_before_who_has_none():
    queue, (a, b, c) = waiting(3)
    arrive(queue, c, 1, 2)
    arrive(queue, b, 3)
    assert list(queue) == [c, b, a] and queue.first is c and queue.hungry is a
    d = SimpleNamespace(blocks=[], computed=0)
    queue.insert(d)
    assert queue.first is c and queue.hungry is d


def test_each_leaves_the_queue_that_it_is_in():
    queue, (a, b) = waiting(2)
    arrive(queue, b, 1)
    queue.remove(b)
    assert list(queue) == [a] and queue.first is a
    queue.remove(a)
    assert queue.first is None and queue.hungry is None and not queue


def test_when_the_pool_is_gone_nobody_holds_anything_and_the_order_stays():
    queue, (a, b, c) = waiting(3)
    arrive(queue, b, 1)
    arrive(queue, c, 2)
    queue.strip()
    assert list(queue) == [b, c, a] and queue.hungry is b
    assert all(sequence.blocks == [] and sequence.computed == 0 for sequence in (a, b, c))
    queue.remove(b)
    assert list(queue) == [c, a]
