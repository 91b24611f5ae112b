"""KV in pieces: whatever order they come in, a part is whole once, right, and of the newest asking."""

import gc
import random

import numpy as np
import pytest

from engine.core.handoff import Parts
from engine.movers.parts import Heads
from engine.replica import landing as module
from engine.replica.landing import Arrived, Landing, Wholes, forget_older, joined, key_of
from engine.replica.orders import Key

LAYERS, BLOCKS, POSITIONS, WIDTH = 2, 3, 2, 4


def heads(first, stop, tag=0, layers=LAYERS):
    """Arrays that say which head of which part they are."""
    shape = (stop - first, layers, BLOCKS, POSITIONS, WIDTH)
    number_K = np.arange(first, stop, dtype=np.int64)[:, None, None, None, None] + 1000 * tag
    return Heads(np.broadcast_to(number_K, shape), np.broadcast_to(-number_K, shape), first)


def part(handoff=1, generation=0, first=0, staged=None):
    return Parts(handoff, generation, first, BLOCKS, staged)


def is_right(found, first, stop, tag):
    """Whether it holds just these heads, in order."""
    wanted = heads(first, stop, tag)
    whole = isinstance(found.staged, Heads) and found.staged.first_head == first
    return whole and all((got == want).all() for got, want in zip(found.staged[:2], wanted[:2], strict=True))


@pytest.mark.parametrize("cuts", [(2, 8), (2, 5, 8), (2, 3, 4, 5, 6, 7, 8)])
def test_pieces_in_any_order_become_the_heads_of_this_process(cuts):
    for seed in range(8):
        landing = Landing(2, 8)
        pieces = list(zip(cuts, cuts[1:], strict=False))
        random.Random(seed).shuffle(pieces)
        found = [landing.heard("p0", part(staged=heads(*each, 7))) for each in pieces]
        assert found[:-1] == [None] * (len(pieces) - 1) and is_right(found[-1], 2, 8, 7)
        assert found[-1][:4] == (1, 0, 0, BLOCKS) and not landing._open


def test_one_piece_that_is_all_is_handed_on_without_a_copy():
    piece = heads(2, 8)
    assert Landing(2, 8).heard("p0", part(staged=piece)).staged is piece and joined([piece]) is piece


@pytest.mark.parametrize(
    "piece", [None, heads(1, 3), heads(7, 9), heads(3, 5), heads(4, 6, layers=3), "no heads"],
    ids=["damaged", "before", "behind", "twice", "unlike", "nonsense"],
)  # fmt: skip
def test_a_piece_that_is_no_good_makes_the_part_empty_at_once(piece):
    landing = Landing(2, 8)
    assert landing.heard("p0", part(staged=heads(2, 4))) is None
    assert landing.heard("p0", part(staged=piece)) == part(staged=None) and not landing._open


def test_a_newer_asking_forgets_what_came_of_the_older_ones_of_that_handoff_alone():
    landing = Landing(0, 4)
    for lane, handoff, generation in (("p0", 1, 0), ("p0", 1, 1), ("p0", 2, 0), ("p1", 1, 0), ("p0", 1, 5)):
        landing.heard(lane, part(handoff, generation, 0, heads(0, 1)))
    landing.heard("p0", part(1, 2, 0, heads(0, 1)))
    left = {(lane, key.handoff, key.generation) for lane, key in landing._open}
    assert left == {("p0", 1, 2), ("p0", 1, 5), ("p0", 2, 0), ("p1", 1, 0)}


def test_pieces_of_several_lanes_and_places_do_not_mix():
    landing = Landing(0, 2)
    for lane, first, tag in (("p0", 0, 1), ("p1", 0, 2), ("p0", 3, 3)):
        assert landing.heard(lane, part(first=first, staged=heads(0, 1, tag))) is None
    for lane, first, tag in (("p0", 3, 3), ("p1", 0, 2), ("p0", 0, 1)):
        assert is_right(landing.heard(lane, part(first=first, staged=heads(1, 2, tag))), 0, 2, tag)


def test_parts_that_are_never_whole_are_held_in_bounded_number():
    landing = Landing(0, 4)
    for handoff in range(3 * module.MOST):
        landing.heard("p0", part(handoff, staged=heads(0, 1)))
    assert len(landing._open) == module.MOST and ("p0", Key(3 * module.MOST - 1, 0, 0)) in landing._open


@pytest.mark.parametrize("seed", range(12))
def test_a_walk_through_lost_doubled_damaged_and_late_pieces(seed, monkeypatch):
    """What is whole is right, and every part becomes whole once it is asked for with nothing in its way."""
    monkeypatch.setattr(module, "MOST", 12)
    rng = random.Random(seed)
    first, stop = rng.choice([(0, 4), (2, 6), (3, 4), (0, 8)])
    landing, asked, wire = Landing(first, stop), {}, []
    for _ in range(400):
        lane, handoff, place = rng.choice(["p0", "p1"]), rng.randrange(3), rng.randrange(2)
        if rng.random() < 0.3 or not wire:
            generation = asked[lane, handoff] = asked.get((lane, handoff), -1) + 1
            wire += cut(rng, lane, part(handoff, generation, place), first, stop)
        lane, piece, tag = wire.pop(rng.randrange(len(wire))) if rng.random() < 0.8 else rng.choice(wire)
        found = landing.heard(lane, piece)
        assert found is None or found.staged is None or is_right(found, first, stop, tag)
        assert found is None or found[:4] == piece[:4]
        assert len(landing._open) <= 12
        check(landing, first, stop)
    for lane in ("p0", "p1"):
        pieces = cut(rng, lane, part(1, 10_000, 0), first, stop, damage=0.0)
        found = [landing.heard(lane, piece) for lane, piece, _ in pieces]
        assert found[:-1] == [None] * (len(found) - 1) and is_right(found[-1], first, stop, pieces[0][2])


def cut(rng, lane, whole, first, stop, damage=0.1):
    """A part in pieces of the heads, some of them damaged."""
    places = sorted({first, stop, *(rng.randint(first, stop) for _ in range(rng.randrange(3)))})
    tag = hash((lane, *whole[:3])) % 1000
    found = []
    for one, next_one in zip(places, places[1:], strict=False):
        staged = None if rng.random() < damage else heads(one, next_one, tag)
        found.append((lane, whole._replace(staged=staged), tag))
    return found


def check(landing, first, stop):
    """No part is held that is whole, overlaps, or has an older asking beside it unless that came late."""
    for pieces in landing._open.values():
        inside = sorted((piece.first_head, piece.stop_head) for piece in pieces)
        assert first <= inside[0][0] and inside[-1][1] <= stop
        assert all(one[1] <= two[0] for one, two in zip(inside, inside[1:], strict=False))
        assert sum(b - a for a, b in inside) < stop - first


def test_a_part_is_the_lanes_when_every_process_has_its_heads():
    forgotten = []
    wholes = Wholes(3, forgotten.append)
    mine = part(staged="mine")
    assert wholes.have(2, "p0", part(staged=True)) is None and wholes.have(0, "p0", mine) is None
    assert wholes.have(2, "p0", part(staged=True)) is None, "the same process twice is not another"
    found = wholes.have(1, "p0", part(staged=True))
    assert isinstance(found.staged, Arrived) and found.staged.key == key_of(mine) and found[:4] == mine[:4]
    assert found.staged.take() == "mine" and not wholes._open and forgotten == []


def test_a_lane_of_one_process_takes_what_came_as_it_is():
    mine = part(staged=object())
    assert Wholes(1, pytest.fail).have(0, "p0", mine).staged is mine.staged


def test_what_one_process_has_damaged_is_empty_for_the_lane_and_forgotten_by_all():
    forgotten = []
    wholes = Wholes(3, forgotten.append)
    wholes.have(0, "p0", part(staged="mine"))
    assert wholes.have(2, "p0", part()) == part() and forgotten == [Key(1, 0, 0)] and not wholes._open


def test_older_askings_and_those_beyond_the_bound_are_forgotten_by_all():
    forgotten = []
    wholes = Wholes(2, forgotten.append)
    wholes.have(1, "p0", part(1, 0, 0, True))
    wholes.have(1, "p0", part(1, 0, 8, True))
    wholes.have(1, "p0", part(1, 1, 0, True))
    assert forgotten == [Key(1, 0, 0), Key(1, 0, 8)]
    for handoff in range(2, module.MOST + 3):
        wholes.have(1, "p0", part(handoff, 0, 0, True))
    assert len(wholes._open) == module.MOST and forgotten[2:] == [Key(1, 1, 0), Key(2, 0, 0)]


def test_what_arrived_and_nobody_took_is_forgotten_once_and_what_was_taken_is_not():
    forgotten = []
    kept, left = (Arrived(Key(k, 0, 0), "content", forgotten.append) for k in range(2))
    assert kept.take() == "content"
    del kept, left
    gc.collect()
    assert forgotten == [Key(1, 0, 0)]


@pytest.mark.parametrize("seed", range(8))
def test_a_walk_of_wholes_never_gives_a_part_that_a_process_lacks(seed, monkeypatch):
    """A part is given when each has said so since its asking was last begun, forgotten when not, and held else."""
    monkeypatch.setattr(module, "MOST", 9)
    rng, forgotten = random.Random(seed), []
    processes = rng.randint(2, 4)
    wholes, said, given = Wholes(processes, forgotten.append), {}, 0
    for turn in range(600):
        key = Key(rng.randrange(5), turn // 150 + rng.randrange(2), rng.randrange(2))
        lane = f"p{key.handoff % 2}"  # a handoff is of one lane
        rank, whole = rng.randrange(processes), rng.random() < 0.9
        before = len(forgotten)
        found = wholes.have(rank, lane, part(*key, True if whole else None))
        for gone in forgotten[before:]:
            said = {named: ranks for named, ranks in said.items() if named[1] != gone or named in wholes._open}
        if whole:
            said.setdefault((lane, key), set()).add(rank)
        if found is not None and whole:
            assert said.pop((lane, key)) == set(range(processes)) and found.staged.take() is True
            given += 1
        assert found is None or found[:3] == key
        assert {named: set(there) for named, there in wholes._open.items()} == said and len(said) <= 9
    assert given and forgotten


def test_what_forget_older_takes_out_it_names():
    found = dict.fromkeys([("p0", Key(1, 0, 0)), ("p0", Key(1, 1, 0)), ("p1", Key(1, 0, 0))], 0)
    assert forget_older(found, ("p0", Key(1, 1, 4))) == [("p0", Key(1, 0, 0))] and len(found) == 2
