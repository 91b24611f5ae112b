import pytest

from engine.movers.spans import Span, heads_of, lane_of, pieces, rank_name
from sharding.mesh import lane_axes

SPANS = [Span(tp, processes) for tp in (1, 2, 4, 8) for processes in (1, 2, 4, 8) if processes <= tp]


def held(kv_heads, span, rank):
    """The heads of every device of a process, by the axes of its lane's mesh."""
    kv, rep = lane_axes(span.tp, 8, kv_heads)
    local = span.tp // span.processes
    width = kv_heads // kv
    return {
        d // rep * width + k for d in range(rank * local, (rank + 1) * local) for k in range(width)
    }  # fmt: skip


@pytest.mark.parametrize("kv_heads", [1, 2, 4, 8])
def test_a_process_has_the_heads_of_its_devices(kv_heads):
    for span in SPANS:
        for rank in range(span.processes):
            assert set(range(*heads_of(kv_heads, span, rank))) == held(kv_heads, span, rank)


@pytest.mark.parametrize("kv_heads", [1, 2, 4, 8])
def test_every_process_gets_each_of_its_heads_once_from_one_that_has_it(kv_heads):
    for source in SPANS:
        for target in SPANS:
            got = {rank: [] for rank in range(target.processes)}
            for piece in pieces(kv_heads, source, target):
                assert set(range(piece.first_head, piece.stop_head)) <= held(kv_heads, source, piece.source)
                got[piece.target] += range(piece.first_head, piece.stop_head)
            assert all(heads == sorted(held(kv_heads, target, rank)) for rank, heads in got.items())


def test_those_that_hold_the_same_head_take_turns():
    assert {piece.source for piece in pieces(1, Span(4, 4), Span(4, 4))} == {0, 1, 2, 3}
    assert pieces(4, Span(4, 2), Span(2, 1)) == ((0, 0, 0, 2), (1, 0, 2, 4))


def test_a_leader_has_the_name_of_its_lane():
    assert rank_name("p0.ab", 0) == "p0.ab" and rank_name("p0.ab", 3) == "p0.ab/3"
    assert [lane_of(name) for name in ("p0.ab", "p0.ab/3", "front")] == [("p0.ab", 0), ("p0.ab", 3), ("front", 0)]
