import pytest
from hypothesis import given
from hypothesis import strategies as st

from sharding.mesh import lane_axes, valid_sizes
from sharding.overlap import Moved, Overlap, moved_bytes, overlaps
from sharding.rules import ShardingError


@st.composite
def pairs(draw):
    """(kv heads, (kv, rep), (kv, rep)) of two lanes of one model, more devices than kv heads included."""
    kv_heads = draw(st.integers(1, 12))
    heads = kv_heads * draw(st.integers(1, 8))
    sizes = st.sampled_from(valid_sizes(heads, kv_heads))
    return kv_heads, lane_axes(draw(sizes), heads, kv_heads), lane_axes(draw(sizes), heads, kv_heads)


def held(kv_heads, axes, shard):
    width = kv_heads // axes[0]
    return range(shard // axes[1] * width, (shard // axes[1] + 1) * width)


@given(pairs())
def test_every_target_shard_gets_each_of_its_heads_once_from_a_shard_that_has_it(pair):
    kv_heads, source, target = pair
    plan = overlaps(kv_heads, source, target)
    for shard in range(target[0] * target[1]):
        mine = [piece for piece in plan if piece.target_shard == shard]
        got = [head for piece in mine for head in range(piece.first_head, piece.stop_head)]
        assert got == list(held(kv_heads, target, shard))
    for piece in plan:
        assert set(range(piece.first_head, piece.stop_head)) <= set(held(kv_heads, source, piece.source_shard))
        assert piece.first_head < piece.stop_head


@given(pairs())
def test_replicas_of_a_head_send_alike(pair):
    kv_heads, source, target = pair
    plan = overlaps(kv_heads, source, target)
    for group in range(source[0]):
        sent = [sum(piece.source_shard == group * source[1] + r for piece in plan) for r in range(source[1])]
        assert max(sent) - min(sent) <= 1


@given(pairs(), st.integers(1, 1000))
def test_no_more_bytes_move_than_the_target_holds(pair, head_bytes):
    kv_heads, source, target = pair
    moved = moved_bytes(overlaps(kv_heads, source, target), head_bytes)
    assert moved.total == kv_heads * target[1] * head_bytes
    assert moved.most_received == kv_heads // target[0] * head_bytes
    assert moved.most_sent * source[0] * source[1] >= moved.total


def test_a_pair_of_meshes_by_hand():
    assert overlaps(4, (2, 1), (4, 1)) == (
        Overlap(0, 0, 0, 1),
        Overlap(0, 1, 1, 2),
        Overlap(1, 2, 2, 3),
        Overlap(1, 3, 3, 4),
    )
    assert overlaps(2, (2, 2), (1, 1)) == (Overlap(0, 0, 0, 1), Overlap(2, 0, 1, 2))
    assert moved_bytes(overlaps(2, (2, 2), (2, 4)), 10) == Moved(80, 20, 10)


@pytest.mark.parametrize("axes", [(3, 1), (0, 1), (2, 0), (8, 1)])
def test_a_mesh_that_does_not_split_the_heads_is_refused(axes):
    with pytest.raises(ShardingError, match=r"for 4 kv heads; expected a kv that divides them"):
        overlaps(4, (1, 1), axes)
