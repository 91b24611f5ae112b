"""What an operator asks of a running server: `serac status`, `serac restart`, `serac drain`, and the RPCs below."""

import asyncio
import io
import json

import pytest
from fake_replica import FakeReplica, serving, until

from engine import cli, restart, status, top
from engine.errors import InvalidArgument, NotReady
from engine.replica.loads import LaneLoad, ProcessNow, Standing

READY = Standing((ProcessNow(0, "h0", "ready"), ProcessNow(1, "h1", "ready")), 2, 3700.0)
STARTING = Standing(
    (ProcessNow(0, "h1", "ready"), ProcessNow(1, "h2", "starting", "load", 3, 97)), 1, 5.0, "rank 1 on h2: lost"
)
GAUGES = {"running": 2.0, "waiting": 0.0, "blocks_available": 1500.0}


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def lanes(server, monkeypatch):
    """A server over two lanes of two processes, one of which starts."""
    replica, _ = server
    found = [
        LaneLoad("d1.3fa0", "decode", "ready", GAUGES, READY),
        LaneLoad("p0", "prefill", "starting", {}, STARTING),
    ]
    monkeypatch.setattr(replica, "lanes", found)
    return found


@pytest.fixture
def client(server):
    with top.connect(server[1][1], None, None) as client:
        yield client


@pytest.fixture
def restarted(server, monkeypatch):
    """What was asked of a replica that restarts d1 and d2."""
    asked = []

    def restart(lanes, drain_s, tell, leave):
        asked.append((lanes, drain_s))
        for lane in lanes or ["d1", "d2"]:
            tell(lane, "draining", "3 under way")
            tell(lane, "ready", "after 2.0 s")

    monkeypatch.setattr(server[0], "restart", restart)
    return asked


def test_status_for_a_program_has_hosts_lanes_and_every_process(server, lanes, capsys):
    assert cli.main(["status", "--server", server[1][1]]) == 1, "a lane is not ready"
    said = json.loads(capsys.readouterr().out)
    assert (said["model"], said["revision"], said["state"], said["whole"]) == ("tiny", "r1", "ready", False)
    assert said["hosts"] == [
        {"name": "h0", "processes": ["d1/0"]},
        {"name": "h1", "processes": ["d1/1", "p0/0"]},
        {"name": "h2", "processes": ["p0/1"]},
    ]
    decode, prefill = said["lanes"]
    assert (decode["lane"], decode["life"], decode["restarts"], decode["since_s"]) == ("d1", "d1.3fa0", 2, 3700.0)
    assert decode["gauges"] == GAUGES and prefill["problem"] == "rank 1 on h2: lost"
    late = {"rank": 1, "host": "h2", "state": "starting", "stage": "load", "done": 3, "of": 97}
    assert prefill["processes"][1] == late
    del lanes[1]
    assert cli.main(["status", "--server", server[1][1], "--json"]) == 0


def test_status_for_a_person_is_a_row_a_process_and_why_a_lane_was_lost(client, lanes):
    assert status.run(client, False, out := Terminal()) == 1
    head, count, _, *table = out.getvalue().splitlines()
    assert head.startswith("serac 1 tiny r1  ready, up ")
    assert count == "1 of 2 lanes ready on 3 hosts, 0 requests open"
    assert table == [
        "lane  role     state     running  waiting  restarts  up         rank  host  process",
        "d1    decode   ready           2        0         2  1 h 1 min     0  h0    ready",
        "                                                                   1  h1    ready",
        "p0    prefill  starting                           1  5 s           0  h1    ready",
        "                                                                   1  h2    starting: load 3 of 97",
        "",
        "p0: rank 1 on h2: lost",
    ]


def test_status_of_lanes_in_the_process_of_the_server_is_a_row_each(server, client, monkeypatch):
    monkeypatch.setattr(server[0], "lanes", [LaneLoad("b0", "both", "ready", GAUGES)])
    assert status.run(client, False, out := Terminal()) == 0
    lines = out.getvalue().splitlines()
    assert lines[1] == "1 of 1 lanes ready, 0 requests open"
    assert lines[-1].split() == ["b0", "both", "ready", "2", "0", "0"]


def test_a_restart_says_each_step_and_takes_the_servers_drain_time(server, restarted, capsys):
    assert cli.main(["restart", "--server", server[1][1]]) == 0
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(each["lane"], each["state"]) for each in said] == [
        ("d1", "draining"),
        ("d1", "ready"),
        ("d2", "draining"),
        ("d2", "ready"),
    ]
    assert restarted == [([], 30.0)]


def test_a_restart_of_some_lanes_for_a_person(client, restarted):
    assert restart.run(client, ["d2"], 1.5, out := Terminal()) == 0
    assert out.getvalue() == "d2: draining, 3 under way\nd2: ready, after 2.0 s\n" and restarted == [(["d2"], 1.5)]


def test_a_lane_that_does_not_come_back_is_an_error_after_what_was_said(server, monkeypatch, capsys):
    def restart(lanes, drain_s, tell, leave):
        tell("d1", "starting", "drained for 0.0 s")
        raise NotReady("lane d1: it does not come back; no other is restarted")

    monkeypatch.setattr(server[0], "restart", restart)
    assert cli.main(["restart", "d1", "--drain=500ms", "--server", server[1][1]]) == NotReady.exit_code
    out, err = capsys.readouterr()
    assert (
        len(out.splitlines()) == 1
        and err == "serac: error: lane d1: it does not come back; no other is restarted\n"
    )


def test_a_replica_in_one_process_has_nothing_to_restart(server, capsys):
    assert cli.main(["restart", "--server", server[1][1]]) == NotReady.exit_code
    assert "restart: the lanes are in the process of the server" in capsys.readouterr().err


@pytest.mark.parametrize("drain_s", [-1.0, float("nan"), float("inf")])
def test_a_lanes_drain_time_is_finite_and_not_negative(client, restarted, drain_s):
    with pytest.raises(InvalidArgument, match="drain_s"):
        list(client.restart(drain_s=drain_s))
    assert not restarted


def test_who_hangs_up_ends_a_restart_after_the_lane_that_it_is_at():
    async def scene():
        left, replica = [], FakeReplica()

        def restart(lanes, drain_s, tell, leave):
            tell("d1", "draining", "")
            left.append(leave.wait(10.0))

        replica.restart = restart
        async with serving(replica) as client:
            async for step in client.restart():
                assert step.lane == "d1"
                break
            await until(lambda: left)
        assert left == [True]

    asyncio.run(scene())


@pytest.mark.parametrize("unfinished", [0, 2])
def test_a_drain_says_how_many_were_cut_off_by_its_exit_code(unfinished, monkeypatch, capsys):
    class Drained:
        def drain(self, timeout_s):
            assert timeout_s == 2.0
            return unfinished

    assert restart.drain(Drained(), 2.0, out := Terminal()) == restart.drain(Drained(), 2.0, plain := io.StringIO())
    assert restart.drain(Drained(), 2.0, plain) == (1 if unfinished else 0)
    assert out.getvalue() == ("drained; 2 cut off\n" if unfinished else "drained\n")
    assert json.loads(plain.getvalue().splitlines()[0]) == {"drained": not unfinished, "unfinished": unfinished}


def test_a_server_that_is_told_to_drain_ends():
    async def scene():
        async with serving(FakeReplica()) as client:
            arguments = ["drain", "--timeout", "5", "--server", client.addresses[1]]
            assert await asyncio.to_thread(cli.main, arguments) == 0
            assert client.server.drained.is_set()

    asyncio.run(scene())
