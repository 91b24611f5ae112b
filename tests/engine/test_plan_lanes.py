"""Plans of lanes: the figures of each size, what a handoff moves, what does not fit."""

import io
import json
import re

import pytest

from engine import cli
from engine.config import Settings
from engine.errors import ConfigError
from engine.plan_lanes import run
from engine.plan_report import run as run_mesh

LANES = "prefill:tp=1, decode:tp=2*2"


def planned(lanes, as_json=True, memory_bytes=None, **settings):
    out = io.StringIO()
    code = run(Settings(lanes=lanes, **settings), "h200", memory_bytes, as_json, out)
    return code, json.loads(out.getvalue()) if as_json else out.getvalue()


def test_each_lane_takes_what_a_mesh_of_its_size_takes():
    code, found = planned(LANES)
    assert code == 0 and found["devices"] == 5 and found["fits"] is True
    assert [(lane["lane"], lane["role"], lane["devices"]) for lane in found["lanes"]] == [
        ("p0", "prefill", 1), ("d1", "decode", 2), ("d2", "decode", 2),
    ]  # fmt: skip
    for lane in found["lanes"]:
        out = io.StringIO()
        run_mesh(Settings(mesh=f"tp={lane['devices']}"), "h200", None, True, out)
        assert {name: lane[name] for name in json.loads(out.getvalue())} == json.loads(out.getvalue())


def test_a_handoff_moves_every_kv_head_once_whatever_the_lanes():
    moved = {planned(lanes)[1]["moved_bytes_per_block"] for lanes in (LANES, "prefill:tp=2,decode:tp=1")}
    (bytes_of_a_block,) = moved
    one = planned("both:tp=1")[1]
    assert bytes_of_a_block == one["lanes"][0]["block_bytes"] > 0 and one["moved_bytes_per_block"] == 0


def test_a_person_reads_a_row_for_each_lane(capsys):
    assert cli.main(["plan", "embedded", "--lanes", LANES, "--device", "h200"]) == 0
    said = capsys.readouterr().out
    assert "on 3 lanes, 5 devices together" in said
    for name, role, tp in (("p0", "prefill", 1), ("d1", "decode", 2), ("d2", "decode", 2)):
        assert re.search(rf"^ *{name} +{role} +{tp} .* MiB", said, re.MULTILINE), said
    assert re.search(r"a handoff moves [\d,]+ bytes a block of 64 tokens", said)


def test_a_lane_that_does_not_fit_is_named_and_fails():
    code, said = planned("prefill:tp=1, decode:tp=8", as_json=False, memory_bytes=30 << 20, kv_memory=20 << 20)
    assert code == 1 and "lane p0 DOES NOT FIT: " in said


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lanes": LANES, "mesh": "tp=1"}, "lanes: got --mesh as well"),
        ({"lanes": "both"}, "lanes: got 'both'; expected ROLE:tp=N"),
        ({"lanes": "prefill:tp=1,decode:tp=3"}, "lane d1: "),
    ],
)
def test_lanes_that_cannot_be_are_refused_by_name(settings, words):
    with pytest.raises(ConfigError, match=re.escape(words)):
        run(Settings(**settings), "h200", None, True, io.StringIO())
