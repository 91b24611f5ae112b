import jax
import pytest
from jax.sharding import AxisType

from sharding.mesh import MeshSpec, check_devices, lane_axes, lane_meshes, parse_mesh, valid_sizes
from sharding.rules import ShardingError


@pytest.mark.parametrize(
    "text, spec",
    [
        ("tp=4", MeshSpec(1, 4)),
        ("dp=2,tp=4", MeshSpec(2, 4)),
        (" tp = 2 , dp = 3 ", MeshSpec(3, 2)),
        ("8", MeshSpec(1, 8)),
        ("dp=2", MeshSpec(2, 1)),
    ],
)
def test_a_mesh_is_written_as_axes_or_as_a_bare_count(text, spec):
    assert parse_mesh(text) == spec
    assert parse_mesh(str(spec)) == spec


@pytest.mark.parametrize(
    "text",
    ["", "tp", "tp=", "tp=0", "-1", "0", "tp=1.5", "tp=1e3", "pp=2", "tp=4,tp=4", "tp=4;dp=2", "9" * 5000, "tp=²"],
)
def test_a_mesh_that_cannot_be_read_is_answered_with_the_valid_forms(text):
    with pytest.raises(ShardingError, match=r"^mesh: .*'tp=4', 'dp=2,tp=4' or a bare count") as caught:
        parse_mesh(text)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "tp, heads, kv_heads, axes",
    [(1, 8, 2, (1, 1)), (2, 8, 2, (2, 1)), (8, 8, 2, (2, 4)), (2, 8, 4, (2, 1)), (8, 8, 1, (1, 8))],
)
def test_kv_heads_are_split_first_and_then_repeated(tp, heads, kv_heads, axes):
    assert lane_axes(tp, heads, kv_heads) == axes


@pytest.mark.parametrize(
    "tp, heads, kv_heads, message",
    [
        (3, 8, 2, r"tp=3 does not divide the 8 query heads; valid tp sizes are 1, 2, 4, 8$"),
        (4, 12, 3, r"tp=4 and the 3 kv heads: neither divides the other; valid tp sizes are 1, 3, 6, 12$"),
        (0, 8, 2, r"tp=0 does not divide the 8 query heads"),
    ],
)
def test_a_size_that_does_not_split_the_heads_is_answered_with_those_that_do(tp, heads, kv_heads, message):
    with pytest.raises(ShardingError, match=message):
        lane_axes(tp, heads, kv_heads)


def test_every_valid_size_splits_the_heads():
    assert all(lane_axes(tp, 48, 8) for tp in valid_sizes(48, 8))
    assert valid_sizes(48, 8) == (1, 2, 4, 8, 16, 24, 48)


def test_lanes_share_no_device_and_keep_the_order_of_shards():
    lanes = lane_meshes(parse_mesh("dp=2,tp=4"), heads=8, kv_heads=2)
    assert [dict(lane.shape) for lane in lanes] == [{"kv": 2, "rep": 2}] * 2
    assert [[device.id for device in lane.devices.flat] for lane in lanes] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert all(lane.axis_types == (AxisType.Explicit, AxisType.Explicit) for lane in lanes)


def test_a_mesh_bigger_than_the_visible_devices_is_refused():
    with pytest.raises(ShardingError, match="8 requested, 4 visible"):
        lane_meshes(parse_mesh("dp=2,tp=4"), 8, 2, jax.devices()[:4])
    with pytest.raises(ShardingError, match="16 requested, 8 visible"):
        check_devices(16, 8, "dp=2,tp=8")
