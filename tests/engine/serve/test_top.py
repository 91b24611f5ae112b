"""`serac top` against a running server, and the words of its screen."""

import io
import json
import re

import pytest
from fake_replica import FakeReplica

from engine import cli, top
from engine.clock import ManualClock
from engine.errors import ConfigError, Unavailable
from engine.replica.loads import LaneLoad, block_states

GAUGES = {
    "running": 2.0,
    "waiting": 1.0,
    "blocks": 100.0,
    "blocks_available": 70.0,
    "blocks_cached": 20.0,
    "blocks_writing": 5.0,
    "blocks_quarantined": 1.0,
}
TOTALS = {"generated_tokens": 1000.0, "moved_blocks": 40.0, "recoveries": 2.0, "handoffs_copying": 3.0}


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def lanes(server, monkeypatch):
    """A server whose replica has a lane that serves and one that is being started."""
    replica, _ = server
    monkeypatch.setattr(replica, "lanes", [LaneLoad("d1.3fa0", "decode", "ready", GAUGES),
                                           LaneLoad("p0", "prefill", "starting")])  # fmt: skip
    load = dict(TOTALS)
    monkeypatch.setattr(replica, "load", lambda: {**GAUGES, **load})
    return load


@pytest.fixture
def client(server):
    with top.connect(server[1][1], None, None) as client:
        yield client


def moments(client, out, count, between):
    """`run` for `count` moments, a second apart."""
    clock = ManualClock(5.0)

    def sleep(seconds):
        nonlocal count
        count -= 1
        if not count:
            raise KeyboardInterrupt
        clock.advance(seconds)
        between()

    return top.run(client, clock, out, once=False, sleep=sleep)


def test_a_program_gets_a_json_line_a_moment_with_rates_from_the_second_on(client, lanes):
    out = io.StringIO()
    assert moments(client, out, 3, lambda: lanes.update(generated_tokens=lanes["generated_tokens"] + 50)) == 0
    said = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [each["tokens_per_s"] for each in said] == [None, 50.0, 50.0]
    assert [each["generated_tokens"] for each in said] == [1000.0, 1050.0, 1100.0]
    assert said[0]["state"] == "ready" and said[0]["title"] == "serac 1 tiny r1" and said[0]["recoveries"] == 2.0
    decode, prefill = said[0]["per_lane"]
    assert decode == {"name": "d1.3fa0", "role": "decode", "state": "ready", **GAUGES}
    assert prefill == {"name": "p0", "role": "prefill", "state": "starting"}


def test_a_total_that_fell_with_its_lane_is_no_negative_rate(client, lanes):
    out = io.StringIO()
    moments(client, out, 2, lambda: lanes.update(moved_blocks=0.0))
    assert json.loads(out.getvalue().splitlines()[1])["moved_blocks_per_s"] == 0.0


def test_a_person_gets_one_screen_that_is_written_over(client, lanes):
    out = Terminal()
    moments(client, out, 2, lambda: lanes.update(moved_blocks=73.0))
    screens = out.getvalue().split(top.HOME)[1:]
    assert len(screens) == 2 and all(screen.endswith(top.REST) for screen in screens)
    lines = [line.removesuffix(top.REST_OF_LINE) for line in screens[1].splitlines()]
    assert re.fullmatch(r"serac 1 tiny r1  ready, up \d+ s", lines[0])
    assert "requests   0 open, 2 sequences run, 1 wait" in lines and "recovered  2 streams" in lines
    assert "tokens     0 a second, 1,000 in all" in lines and "moved      73 blocks, 33 a second" in lines
    assert any(
        line.startswith("handoffs   0 in all, 0 asked again; now 0 offered, 0 reserved, 3 copying,")
        for line in lines
    )
    blocks = "########+!======................  25 held, 20 cached, 1 quarantined, 4 writing, 50 free"
    assert f"d1    decode   ready           2        1  {blocks}" in lines
    assert "p0    prefill  starting" in lines


def test_once_is_one_moment(server, lanes, capsys, monkeypatch):
    assert cli.main(["top", "--server", server[1][1], "--once"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["tokens_per_s"] is None
    out = Terminal()
    with top.connect(server[1][1], None, None) as client:
        assert top.run(client, ManualClock(), out, once=True) == 0
    assert top.HOME not in out.getvalue() and "tokens     - a second, 1,000 in all" in out.getvalue()


def test_a_bar_is_as_long_whatever_the_shares():
    for held in range(0, 101, 7):
        for cached in range(0, 101 - held, 9):
            states = dict.fromkeys(top.LETTERS, 0.0) | {"held": held, "cached": cached, "free": 100 - held - cached}
            assert len(top.bar(states)) == top.BAR and top.bar(states).count("#") == round(held / 100 * top.BAR)
    assert top.bar(dict.fromkeys(top.LETTERS, 0.0)) == ""
    assert sum(block_states(GAUGES).values()) == GAUGES["blocks"]


@pytest.mark.parametrize(("seconds", "words"), [(59, "59 s"), (61, "1 min 1 s"), (7260, "2 h 1 min")])
def test_how_long_it_is_up_is_said_in_two_units(seconds, words):
    moment = top.Moment(0.0, "serac", "ready", seconds, {}, [])
    assert top.screen(moment, None)[0].endswith(f"up {words}")


def test_a_server_that_is_not_there_is_one_error(capsys):
    assert cli.main(["top", "--server", "127.0.0.1:1", "--once"]) == Unavailable("").exit_code
    assert capsys.readouterr().err.startswith("serac: error: ")


def test_a_token_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ConfigError, match="token_file"):
        top.connect("127.0.0.1:1", tmp_path / "none", None)


def test_a_fake_replica_without_lanes_shows_none(server, client):
    assert isinstance(server[0], FakeReplica) and top.ask(client, ManualClock()).lanes == []
