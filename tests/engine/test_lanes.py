"""Which lanes a line of text names, and what is said of a line that names none."""

import pytest

from engine.errors import ConfigError
from engine.lanes import LOCAL, LaneSpec, alike, device_count, move, parse_lanes, spoken


@pytest.mark.parametrize(
    ("text", "lanes"),
    [
        ("both:tp=8", [("b0", "both", 8)]),
        ("prefill:tp=2, decode:tp=4", [("p0", "prefill", 2), ("d1", "decode", 4)]),
        ("prefill:tp=1*2,decode:tp=2", [("p0", "prefill", 1), ("p1", "prefill", 1), ("d2", "decode", 2)]),
        ("prefill:1,decode:2", [("p0", "prefill", 1), ("d1", "decode", 2)]),
        ("  both : tp = 1 * 2 ", [("b0", "both", 1), ("b1", "both", 1)]),
        ("decode:tp=1,both:tp=1", [("d0", "decode", 1), ("b1", "both", 1)]),
        ("prefill:tp=1,both:tp=1", [("p0", "prefill", 1), ("b1", "both", 1)]),
        ("both:tp=8/2*2", [("b0", "both", 8, (LOCAL, LOCAL)), ("b1", "both", 8, (LOCAL, LOCAL))]),
    ],
)
def test_a_line_names_lanes_in_the_order_of_their_devices(text, lanes):
    assert parse_lanes(text) == tuple(LaneSpec(*lane) for lane in lanes)
    assert device_count(text) == sum(lane[2] for lane in lanes)


@pytest.mark.parametrize(
    ("text", "item"),
    [
        ("", ""),
        ("prefill", "prefill"),
        ("prefill:tp=1,", ""),
        ("tp=2", "tp=2"),
        ("prefil:tp=1,decode:tp=1", "prefil:tp=1"),
        ("prefill:tp=0,decode:tp=1", "prefill:tp=0"),
        ("prefill:tp=1*0,decode:tp=1", "prefill:tp=1*0"),
        ("prefill:tp=-1,decode:tp=1", "prefill:tp=-1"),
        ("prefill:dp=2,decode:tp=1", "prefill:dp=2"),
        ("prefill:tp=1;decode:tp=1", "prefill:tp=1;decode:tp=1"),
        ("both:tp=99999", "both:tp=99999"),
        ("both:tp=8/3", "both:tp=8/3"),
        ("both:tp=8/0", "both:tp=8/0"),
    ],
)
def test_a_wrong_entry_is_shown_beside_the_forms(text, item):
    with pytest.raises(ConfigError) as caught:
        parse_lanes(text)
    words = f"{item!r}; expected ROLE:tp=N, ROLE:tp=N*COUNT or ROLE:tp=N/PROCESSES, comma between them"
    assert caught.value.field == "lanes" and words in str(caught.value)
    assert device_count(text) == 1


@pytest.mark.parametrize(("role", "other"), [("prefill", "decode"), ("decode", "prefill")])
def test_lanes_of_one_half_alone_serve_nothing(role, other):
    with pytest.raises(ConfigError, match=f"got {role} lanes only; expected at least one of {other} or both"):
        parse_lanes(f"{role}:tp=1*2")


def test_lanes_of_a_mesh_are_alike_and_move_nothing():
    assert alike(2, 4) == (LaneSpec("b0", "both", 4), LaneSpec("b1", "both", 4))
    assert not move(alike(2, 4)) and not move(parse_lanes("both:tp=1"))
    assert move(parse_lanes("prefill:tp=1,decode:tp=1")) and move(parse_lanes("prefill:tp=1,both:tp=1"))


def test_lanes_are_spoken_of_by_name_role_and_size():
    lanes = parse_lanes("prefill:tp=1, decode:tp=2")
    assert spoken(lanes) == "p0 prefill on 1 device, d1 decode on 2 devices"
    assert str(lanes[1]) == "d1 decode:tp=2"
