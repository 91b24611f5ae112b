"""Workers that are ready, live, end, come back and are given up: small scripts in real processes."""

import json
import os
import queue
import subprocess
import sys
import time

import pytest

from engine.cluster import group, supervisor
from engine.cluster.process import Command, Started
from engine.cluster.rank_logs import RankLogs
from engine.cluster.supervisor import Supervisor
from engine.errors import ConfigError, Misfit, Unavailable

READY = """
import json, os, sys, time
def say(**words): print(json.dumps(words), flush=True)
say(event="hello", alike={"jax": "1"}, orders="there")
start = next(words["start"] for line in sys.stdin if "start" in (words := json.loads(line)))
say(event="stage", stage="load", done=1, of=2)
say(event="ready", pid=os.getpid(), number=7, orders=start["orders"])
"""
LIVES = (
    READY
    + """
for line in sys.stdin:
    words = json.loads(line)
    if "exit" in words: sys.exit(words["exit"])
    if "name" in words: say(event="life", name=words["name"])
sys.exit(0)
"""
)
WAIT_S = 20.0


class Told:
    """What a supervisor tells, as it comes."""

    def __init__(self):
        self._said = queue.Queue()

    def __call__(self, slot, words):
        self._said.put((slot, words))

    def next(self, event):
        """The next of this kind; others before it are dropped."""
        while True:
            slot, words = self._said.get(timeout=WAIT_S)
            if words["event"] == event:
                return slot, words


@pytest.fixture
def told():
    return Told()


@pytest.fixture
def start(told, monkeypatch):
    """start(script, ...) -> (the supervisor, its facts); restarts come soon."""
    monkeypatch.setattr(supervisor, "FIRST_WAIT_S", 0.02)
    made = []

    def start(*scripts):
        commands = {}
        for k, script in enumerate(scripts):  # several in a list are the processes of one lane
            ranks = script if isinstance(script, list) else [script]
            commands[f"w{k}"] = [
                Command([sys.executable, "-c", each], os.environ, f"h{rank}") for rank, each in enumerate(ranks)
            ]
        made.append(Supervisor(commands, told))
        return made[-1], made[-1].start(lambda *_: None)

    yield start
    for each in made:
        each.stop()


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_all_workers_are_ready_and_their_facts_known_before_any_serves(start):
    _, facts = start(LIVES, "import time; time.sleep(0.3)\n" + LIVES)
    assert sorted(facts) == ["w0", "w1"]
    assert all(each["number"] == 7 for each in facts.values()) and facts["w0"]["pid"] != facts["w1"]["pid"]


def test_a_worker_hears_lines_and_tells_the_name_of_its_life(start, told):
    made, _ = start(LIVES)
    made.workers["w0"].say([{"name": "w0.a"}])
    assert (
        told.next("life") == ("w0", {"event": "life", "name": "w0.a", "rank": 0})
        and made.workers["w0"].name == "w0.a"
    )


@pytest.mark.parametrize("code", [0, 1, 3])
def test_a_worker_that_ends_is_told_with_its_name_and_started_again(start, told, code):
    made, facts = start(LIVES)
    made.workers["w0"].say([{"name": "w0.a"}])
    told.next("life")
    made.workers["w0"].say([{"exit": code}])
    ended = {"event": "exit", "code": code, "name": "w0.a", "given_up": False}
    assert told.next("exit") == ("w0", ended)
    assert told.next("ready")[1]["pid"] != facts["w0"]["pid"]


def test_a_killed_worker_is_started_again(start, told):
    made, facts = start(LIVES)
    made.workers["w0"].processes[0].popen.kill()
    assert told.next("exit")[1]["code"] == -9
    assert alive(told.next("ready")[1]["pid"]) and not alive(facts["w0"]["pid"])


def test_a_configuration_error_is_not_tried_again_and_surfaces_in_its_own_words(start, told):
    wrong = "import sys; print('serac: error: mesh: got tp=9; expected 1, 2', file=sys.stderr); sys.exit(2)"
    with pytest.raises(ConfigError, match="^lane w1: mesh: got tp=9; expected 1, 2$"):
        start(LIVES, wrong)
    assert told.next("exit") == ("w1", {"event": "exit", "code": 2, "name": "", "given_up": True})


def test_a_worker_that_never_starts_is_given_up_after_waits_that_double(start, told):
    began = time.monotonic()
    with pytest.raises(ConfigError, match="^lane w0: its process ended; its last lines above say why$"):
        start("raise SystemExit(1)")
    exits = [told.next("exit")[1]["given_up"] for _ in range(supervisor.MOST_STARTS)]
    assert exits == [False] * (supervisor.MOST_STARTS - 1) + [True]
    assert time.monotonic() - began > 0.02 * (2 ** (supervisor.MOST_STARTS - 1) - 1)


def test_a_lane_that_served_for_longer_than_it_was_waited_for_is_started_again_as_often_as_it_takes(start, told):
    made, _ = start(LIVES)
    for _ in range(supervisor.MOST_STARTS + 1):
        time.sleep(0.1)
        made.workers["w0"].say([{"exit": 1}])
        assert not told.next("exit")[1]["given_up"]
        told.next("ready")


def test_a_lane_that_ends_as_soon_as_it_serves_is_given_up_and_the_log_says_so(start, told, monkeypatch, caplog):
    monkeypatch.setattr(supervisor, "MOST_STARTS", 2)
    monkeypatch.setattr(supervisor, "FIRST_WAIT_S", 2.0)
    made, _ = start(LIVES)
    exits = []
    for _ in range(supervisor.MOST_STARTS):
        told.next("ready")
        made.workers["w0"].say([{"exit": 1}])
        exits.append(told.next("exit")[1]["given_up"])
    made.stop()
    assert exits == [False, True]
    assert "lane w0 ended with code 1; given up: mend it and start all again" in caplog.text


def test_workers_that_were_ready_end_when_another_cannot_be_started(start, told):
    with pytest.raises(ConfigError):
        start(LIVES, "import time; time.sleep(0.5); raise SystemExit(2)")
    assert not alive(told.next("ready")[1]["pid"])


def test_a_worker_ends_when_its_input_does(start, told):
    made, facts = start(LIVES)
    made.workers["w0"].processes[0].popen.stdin.close()
    assert told.next("exit")[1]["code"] == 0 and not alive(facts["w0"]["pid"])


def test_stop_ends_every_process_and_starts_none_again(start):
    made, facts = start(LIVES, LIVES)
    made.stop()
    assert not any(alive(each["pid"]) for each in facts.values())
    assert all(worker.processes[0].popen.returncode == -15 for worker in made.workers.values())


def test_a_worker_that_heeds_no_signal_is_killed(start, monkeypatch):
    monkeypatch.setattr(supervisor, "STOP_S", 0.2)
    made, facts = start("import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + LIVES)
    made.stop()
    assert made.workers["w0"].processes[0].popen.returncode == -9 and not alive(facts["w0"]["pid"])


def test_lines_that_are_no_json_are_logged_under_the_workers_name(start, caplog):
    with caplog.at_level("INFO", logger="serac.supervisor"):
        start("print('loading')\nimport sys; print('careful', file=sys.stderr, flush=True)\n" + LIVES)
        until = time.monotonic() + WAIT_S
        while len(caplog.messages) < 2 and time.monotonic() < until:
            time.sleep(0.01)
    assert sorted(caplog.messages) == ["worker w0: careful", "worker w0: loading"]


def test_log_lines_of_a_worker_are_passed_on_as_they_are(start, capsys):
    line = json.dumps({"level": "info", "message": "mine"})
    start(f"import sys; print({line!r}, file=sys.stderr, flush=True)\n" + LIVES)[0].stop()
    assert capsys.readouterr().err == line + "\n"


def test_the_processes_of_a_lane_start_once_all_are_there_and_know_where_the_first_is(start):
    _, facts = start(
        [LIVES, "import time; time.sleep(0.5)\n" + LIVES.replace('orders="there"', 'orders="elsewhere"')]
    )
    assert facts["w0"]["orders"] == "there"


@pytest.mark.parametrize("rank", [0, 1])
def test_a_lane_ends_and_comes_back_with_all_of_its_processes(start, told, rank):
    made, facts = start([LIVES, LIVES])
    before = [process.popen.pid for process in made.workers["w0"].processes]
    os.kill(before[rank], 9)
    assert told.next("exit")[1]["code"] == -9
    assert told.next("ready")[1]["pid"] not in before and not any(map(alive, before))


def test_processes_that_do_not_fit_are_refused_by_name_before_they_start(start):
    with pytest.raises(Misfit, match="^lane w0: rank 1 on h1: jax is 2, and at rank 0 it is 1; all processes"):
        start([LIVES, LIVES.replace('"jax": "1"', '"jax": "2"')])


def test_a_host_that_says_nothing_is_named(start, monkeypatch):
    monkeypatch.setattr(group, "HELLO_S", 1.0)
    with pytest.raises(Unavailable, match="^lane w0: rank 1 on h1 has said nothing for 1 s; expected its hello"):
        start([LIVES, "import time; time.sleep(60)"])


def test_what_a_process_said_before_it_left_is_why_its_lane_was_lost(start, monkeypatch):
    monkeypatch.setattr(supervisor, "MOST_STARTS", 1)
    with pytest.raises(ConfigError, match="^lane w0: its process on h0: rank 1 has ended$"):
        start(
            READY.partition('say(event="stage"')[0] + "\nsay(event='lost', reason='rank 1 has ended'); os._exit(75)"
        )


def test_the_last_lines_of_a_lane_that_is_lost_later_are_shown_once_and_those_of_who_ended_first_before(
    start, told, caplog
):
    dying = LIVES.replace(
        'if "exit" in words:', 'if "exit" in words: print("my end", file=sys.stderr, flush=True);'
    )
    made, _ = start(
        [LIVES.replace("import json", "import sys; print('calm', file=sys.stderr)\nimport json"), dying]
    )
    made.workers["w0"].processes[1].say({"exit": 3})
    assert told.next("exit")[1]["code"] == 3
    told.next("ready")
    shown = [line for line in caplog.messages if line.startswith("lane w0 rank")]
    assert shown == ["lane w0 rank 1 on h1: my end", "lane w0 rank 0 on h0: calm"]


@pytest.mark.parametrize("code, before, told_as", [(255, "", 69), (255, READY, 255), (3, "", 3)])
def test_a_host_that_ssh_does_not_reach_is_missing_and_one_that_killed_its_process_is_not(code, before, told_as):
    heard = queue.Queue()
    words = [sys.executable, "-c", before.partition("start = ")[0] + f"\nraise SystemExit({code})"]
    process = Started("w0", 0, Command(words, os.environ, "h0", away=True), heard.put, lambda line: None)
    process.end(time.monotonic() + WAIT_S)
    assert process.code == told_as and ("h0 is not reached" in process.problem) == (told_as == 69)


def test_a_process_that_is_away_is_asked_over_its_input_and_its_own_code_is_heard():
    heard = queue.Queue()
    script = READY + "print(json.dumps(json.loads(sys.stdin.readline())), flush=True)\nsys.exit(5)"
    words = [sys.executable, "-c", script]
    process = Started("w0", 0, Command(words, os.environ, "h0", away=True), heard.put, lambda line: None)
    process.say({"start": {"orders": "there"}})
    process.leave(75)
    process.end(time.monotonic() + WAIT_S)
    assert process.code == 5 and (0, {"leave": 75}) in [heard.get() for _ in range(heard.qsize())]


def test_what_each_process_says_is_in_a_file_of_its_own(told, tmp_path):
    script = "import sys; print('careful', file=sys.stderr, flush=True)\n" + LIVES
    commands = [Command([sys.executable, "-c", each], os.environ, "h0") for each in (script, LIVES)]
    made = Supervisor({"w0": commands}, told, logs=RankLogs(tmp_path))
    made.start(lambda *_: None)
    made.stop()
    first, second = (
        [json.loads(line) for line in (tmp_path / f"w0-{rank}.jsonl").read_text().splitlines()] for rank in (0, 1)
    )
    assert {"said": "careful"}.items() <= next(each for each in first if "said" in each).items()
    assert [each["event"] for each in second] == ["hello", "ready"]


def test_a_mistake_of_one_process_of_several_is_told_with_its_rank_and_host(start):
    wrong = "import sys; print('serac: error: devices: got 1', file=sys.stderr); sys.exit(2)"
    with pytest.raises(ConfigError, match="^lane w0: rank 1 on h1: devices: got 1$"):
        start([LIVES, wrong])


def test_a_program_that_is_not_there_is_a_mistake_and_leaves_no_other_process_behind(told, monkeypatch):
    begun, popen = [], subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: begun.append(popen(*a, **k)) or begun[-1])
    script = "import time; time.sleep(60)"
    there, gone = Command([sys.executable, "-c", script], os.environ), Command(["/no/such/program"], os.environ)
    made = Supervisor({"w0": [there, gone]}, told)
    with pytest.raises(ConfigError, match=r"^lane w0: its process cannot be started \(No such file"):
        made.start(lambda *_: None)
    assert [each.poll() for each in begun] == [-15]
