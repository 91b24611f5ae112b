"""A worker's lines with whoever started it: words in order of need, and an end when the lines end."""

import json
import queue
import subprocess
import sys
import threading
import time

import pytest

from engine.core.membership import Line
from engine.core.messages import FRONT
from engine.movers.links import Links
from engine.starter import Starter, Visit

SECRET = bytes(range(32))
WORKER = """
import json, signal, sys, threading, time
from engine import starter
starter.GRACE_S = 0.3
how = sys.argv[1]
if how == "silent":
    class Fast:
        monotonic, sleep = time.monotonic, lambda seconds: time.sleep(seconds / 20)
    starter.time, starter.SILENT = Fast, 20
if how == "deaf": signal.signal(signal.SIGTERM, lambda *_: time.sleep(60))
if how == "left": signal.signal(signal.SIGTERM, lambda *_: sys.exit(here.exit_code))
here = starter.Starter(starter.Pipes(sys.stdin, sys.stdout))
here.on_tls = lambda words: here.say(event="tls", **words)
here.say(event="hello")
here.say(**here.wait("start")["start"])
if how == "lost": here.lost("why")
here.say(**here.wait("front"))
threading.Event().wait(60)
"""
START, JOIN = {"start": {"epoch": "e"}}, {"front": "there"}


class Worker:
    """A process with the lines of a worker."""

    def __init__(self, how):
        command, pipe = [sys.executable, "-c", WORKER, how], subprocess.PIPE
        self._popen = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)

    def says(self):
        return json.loads(self._popen.stdout.readline())

    def hear(self, *lines):
        self._popen.stdin.write("".join(json.dumps(line) + "\n" for line in lines))
        self._popen.stdin.flush()

    def end(self):
        """Its input ends; how it ended."""
        self._popen.stdin.close()
        return self.ended()

    def ended(self):
        """How it ended by itself."""
        code = self._popen.wait(timeout=20)
        self.rest, self.errors = self._popen.stdout.read(), self._popen.stderr.read()
        return code

    def close(self):
        self._popen.kill()
        self._popen.wait()
        for stream in (self._popen.stdin, self._popen.stdout, self._popen.stderr):
            stream.close()


@pytest.fixture
def worker():
    made = []

    def make(how="plain"):
        made.append(Worker(how))
        return made[-1]

    yield make
    for each in made:
        each.close()


def test_lines_are_kept_for_who_waits_for_them_and_others_pass(worker):
    here = worker()
    assert here.says() == {"event": "hello"}
    here.hear({"beat": 1}, JOIN, {"something": "new"}, {"tls": {"a": 1}}, START)
    assert [here.says() for _ in range(3)] == [{"event": "tls", "a": 1}, {"epoch": "e"}, JOIN]
    assert here.end() == -15, "SIGTERM, which a server takes as its end"


def test_a_worker_that_sigterm_does_not_end_ends_all_the_same(worker):
    here = worker("deaf")
    here.hear(START, JOIN)
    assert [here.says() for _ in range(3)][-1] == JOIN
    began = time.monotonic()
    assert here.end() == 75 and time.monotonic() - began < 10


def test_a_worker_that_is_told_to_leave_ends_with_the_code_that_it_was_told(worker):
    here = worker("left")
    assert here.says() == {"event": "hello"}
    here.hear(START, JOIN, {"leave": 69})
    assert here.ended() == 69


def test_a_worker_that_is_refused_ends_at_once_and_says_so(worker):
    here = worker()
    here.hear(START, {"refused": "another release"})
    assert here.ended() == 78 and "another release" in here.errors


def test_a_starter_that_falls_silent_is_as_good_as_gone(worker):
    here = worker("silent")
    here.hear(START, JOIN)
    assert [here.says() for _ in range(3)][-1] == JOIN
    for _ in range(10):
        time.sleep(0.2)
        here.hear({"beat": 1})
    assert here.ended() == -15 and "has said nothing for 20 s" in here.errors


def test_a_process_that_cannot_go_on_says_why_and_is_gone(worker):
    here = worker("lost")
    here.hear(START)
    assert here.ended() == 75
    assert json.loads(here.rest.splitlines()[-1]) == {"event": "lost", "reason": "why"}


def test_stages_are_told_at_their_ends_and_now_and_then_between(monkeypatch):
    class Kept:
        said = []

        def read(self):
            return iter(queue.SimpleQueue().get, None)

        def write(self, text):
            self.said.append(json.loads(text))

    monkeypatch.setattr(threading.Thread, "start", lambda thread: None)  # nobody listens or watches
    starter = Starter(Kept())
    for done in range(1001):
        starter.show("load", done, 1000)
    starter.show("compile", 1, 9)
    assert [(each["stage"], each["done"]) for each in Kept.said][:: len(Kept.said) - 1] == [
        ("load", 0),
        ("compile", 1),
    ]
    assert ("load", 1000) in [(each["stage"], each["done"]) for each in Kept.said] and len(Kept.said) < 60


def test_a_visit_says_its_hello_until_the_front_answers_and_ends_with_the_connection(monkeypatch):
    heard = queue.Queue()
    front = Links(FRONT, SECRET, lambda sender, line: heard.put((sender, line)), lambda peer: None)
    front.start(["127.0.0.1:0"])
    monkeypatch.setattr("engine.starter.AGAIN_S", 0.02)
    visit = Visit("p0/1", front.addresses[0], SECRET, None)
    lines = visit.read()
    try:
        visit.write("hello")
        sender, _ = heard.get(timeout=10)
        assert [heard.get(timeout=10)[1] for _ in range(3)] == [Line("hello")] * 3
        assert sender.startswith("process p0/1 ")
        front.post(sender, Line("start"))
        assert next(lines) == "start"
        time.sleep(0.1)
        while not heard.empty():
            heard.get()
        visit.write("stage")
        assert heard.get(timeout=10)[1] == Line("stage")
        time.sleep(0.1)
        assert heard.empty(), "what is said after the answer is said once"
    finally:
        front.close()
    assert next(lines, None) is None, "its lines end"
    visit._links.close()
