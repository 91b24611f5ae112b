import numpy as np

from engine.core import prefix
from engine.core.plan import COUNT, DRAW, ROW, START
from engine.core.request import Request, Sampling, Stopping
from engine.core.rows import Rows
from engine.core.sequence import Part, sequences

EOS = 99


def made(num_rows=4):
    return Rows(num_rows, max_length=32, block_size=4, vocab=100, eos_ids=(EOS,))


def seated(rows, serial, length=5, max_tokens=20, **stopping):
    """A sequence in a row, its prompt computed, ready to decode."""
    request = Request(str(serial), tuple(range(1, length + 1)), Sampling(), Stopping(max_tokens, **stopping))
    parent = prefix.start(prefix.root("test"), "", b"")
    sequence = sequences(request, (Part(serial),), 0, 32, (EOS,), parent)[0]
    row = rows.seat(sequence, list(range(1, 3 + length // 4)), length)
    rows.open(row)
    return sequence


def test_rows_that_decode_together_are_gathered_once():
    rows = made()
    for serial in range(3):
        seated(rows, serial)
    cohort = rows.cohort()
    assert cohort.rows == slice(0, 3) and cohort.serials.tolist() == [0, 1, 2]
    first, second = rows.decode(cohort), rows.decode(rows.cohort())
    assert rows.cohort() is cohort
    assert first[:, START].tolist() == [5, 5, 5] and second[:, START].tolist() == [6, 6, 6], "plans do not change"
    assert second[:, ROW].tolist() == [0, 1, 2] and (second[:, COUNT] == 1).all() and (second[:, DRAW] == 1).all()


def test_one_that_leaves_or_takes_a_place_makes_another_cohort():
    rows = made()
    group = [seated(rows, serial) for serial in range(3)]
    old = rows.cohort()
    rows.leave(group[1])
    assert rows.cohort().numbers.tolist() == [0, 2]
    newcomer = seated(rows, 7)
    assert newcomer.row == 1 and rows.cohort().key == old.key, "the same rows decode"
    assert rows.cohort().serials.tolist() == [0, 7, 2]
    rows.leave(group[0])
    seated(rows, 8)
    assert rows.cohort().serials.tolist() == [8, 7, 2], "the same rows, unseen in between"
    rows.check(in_flight=1)


def test_a_row_decodes_no_further_than_its_limit():
    rows = made()
    seated(rows, 0, length=5, max_tokens=3)
    for _ in range(2):
        rows.decode(rows.cohort())
    assert len(rows.cohort().numbers) == 0 and rows.computed[0] == 7


def test_a_full_block_is_seen_and_a_new_one_appended():
    rows = made()
    seated(rows, 0, length=4)
    seated(rows, 1, length=6)
    rows.num_blocks[:2] = [1, 2]
    cohort = rows.cohort()
    assert cohort.full().tolist() == [0]
    rows.grow(cohort, cohort.full(), np.array([9], np.int32))
    assert len(cohort.full()) == 0 and rows.table[0, 1] == 9 and rows.num_blocks[:2].tolist() == [2, 2]


def test_tokens_end_rows_by_length_by_eos_and_by_their_own_stop_ids():
    rows = made()
    seated(rows, 0, max_tokens=1)
    seated(rows, 1)
    seated(rows, 2, stop_token_ids=(42,))
    seated(rows, 3, ignore_eos=True)
    tokens = np.array([7, EOS, 42, EOS], np.int32)
    assert rows.receive(slice(0, 4), tokens).tolist() == [True, True, True, False]
    assert [rows.known(row) for row in range(4)] == [6, 6, 6, 6] and rows.history[:, 5].tolist() == tokens.tolist()
    again = np.array([42, EOS], np.int32)
    assert rows.receive(np.array([3, 2]), again).tolist() == [False, True]
    assert rows.history[3, 6] == 42 and rows.history[2, 6] == EOS
