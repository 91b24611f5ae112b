"""In what order those that wait for a row get one."""

from types import SimpleNamespace

from engine.core.waiting import Waiting


def made(serial):
    return SimpleNamespace(serial=serial, blocks=[], computed=0)


def waiting(count):
    queue, sequences = Waiting(), [made(serial) for serial in range(1, count + 1)]
    for sequence in sequences:
        queue.append(sequence)
    return queue, sequences


def arrive(queue, sequence, *blocks):
    sequence.blocks, sequence.computed = list(blocks), 4 * len(blocks)
    queue.arrive(sequence)


def test_the_oldest_is_first_and_who_was_preempted_before_the_rest():
    queue, (a, b) = waiting(2)
    assert queue.first is queue.hungry is a and list(queue) == [a, b] and len(queue) == 2
    queue.remove(a)
    queue.insert(a)
    c = made(0)
    queue.insert(c)
    assert list(queue) == [c, a, b]


def test_who_came_first_is_first_whether_it_has_blocks_or_not():
    queue, (a, b, c) = waiting(3)
    arrive(queue, c, 1, 2)
    arrive(queue, b, 3)
    assert queue.first is a is queue.hungry and queue.arrived is c and list(queue) == [c, b, a]
    queue.remove(a)
    assert queue.first is queue.arrived is c and queue.hungry is None
    queue.append(made(4))
    assert queue.first is c, "it came before"
    queue.remove(c)
    assert queue.first is queue.arrived is b


def test_each_leaves_the_queue_that_it_is_in():
    queue, (a, b) = waiting(2)
    arrive(queue, b, 1)
    queue.remove(b)
    assert list(queue) == [a] and queue.first is a
    queue.remove(a)
    assert queue.first is None and queue.arrived is None and queue.hungry is None and not queue


def test_when_the_pool_is_gone_nobody_holds_anything_and_the_order_stays():
    queue, (a, b, c) = waiting(3)
    arrive(queue, b, 1)
    arrive(queue, c, 2)
    queue.strip()
    assert list(queue) == [b, c, a] and queue.hungry is b
    assert all(sequence.blocks == [] and sequence.computed == 0 for sequence in (a, b, c))
    queue.remove(b)
    assert list(queue) == [c, a]
