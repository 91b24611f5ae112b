"""What holds for KV between two processes whatever carries it: sockets, memory of one host, a library.

The library's rows are skipped where it is not installed; `pulled` is its protocol with a stand-in for it.
"""

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from drawn_messages import Drawn, same
from ends import ROOM, SECRET, End, Memory, crosses, part, until

from engine.core.handoff import Fetch, Parts
from engine.movers import connection
from engine.movers.links import Limits
from engine.movers.nixl import INSTALL, Nixl
from engine.movers.parts import Heads

HERE = Path(__file__).parent
NIXL = pytest.mark.skipif(importlib.util.find_spec("nixl") is None, reason=f"nixl is not installed here: {INSTALL}")
WAYS = ["tcp", "unix", "shared", "pulled", pytest.param("nixl", marks=NIXL)]
COUNTS = {"shared": "shared", "pulled": "pulled", "nixl": "pulled"}  # what the sender counts for this way


class Way:
    """Makes ends that use one way, and ends them."""

    def __init__(self, name, folder, stack):
        self.name, self._folder, self._stack, self._meets = name, folder, stack, set()

    def address(self, name):
        return f"unix:{self._folder}/sockets/{name}.sock" if self.name in ("unix", "shared") else "127.0.0.1:0"

    def end(self, name):
        limits = Limits(shared_bytes=ROOM if self.name == "shared" else 0)
        kinds = {"pulled": lambda: Memory(self._meets), "nixl": lambda: Nixl(ROOM)}
        mover = kinds[self.name]() if self.name in kinds else None
        made = End(name, self.address(name), limits, mover)
        self._stack.callback(made.close)
        return made

    def went(self, end, count):
        """`count` parts of an end took this way, and not another."""
        if self.name in COUNTS:
            until(lambda: end.counts[COUNTS[self.name]] == count)
        assert not end.counts["unpulled"] and not end.counts["unshared"]
        return True

    @contextlib.contextmanager
    def process(self, name):
        """An end in a process of its own that sends back what it hears; and its address."""
        kind = {"unix": "sockets", "nixl": "nixl"}.get(self.name, "auto")
        command = [sys.executable, "peer.py", name, SECRET.hex(), self.address(name), kind]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parents[2]), *filter(None, sys.path)])}
        with subprocess.Popen(
            command, cwd=HERE, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as process:
            yield process, process.stdout.readline().strip()
            process.stdin.close()


@pytest.fixture(params=WAYS)
def way(request, tmp_path):
    with contextlib.ExitStack() as stack:
        yield Way(request.param, tmp_path, stack)


@pytest.fixture
def pair(way):
    here, there = way.end("p0"), way.end("d0")
    here.links.meet("d0", there.links.addresses[0])
    return here, there


def test_parts_of_every_size_cross_both_ways_as_they_were(way, pair):
    drawn = [part(number, blocks) for number, blocks in enumerate((1, 7, 32))] + [Drawn(7).parts()]
    for sender, receiver in (pair, pair[::-1]):
        assert all(crosses(sender, receiver, each) for each in drawn)
        assert way.went(sender, len(drawn))


def test_a_part_without_blocks_crosses(pair):
    here, there = pair
    here.links.post("d0", Parts(1, 2, 3, 4, None))
    assert there.get() == Parts(1, 2, 3, 4, None)
    assert crosses(here, there, part(1))


def test_heads_that_are_cut_out_of_larger_arrays_cross_as_one(way, pair):
    here, there = pair
    sent = part(2)
    room = [np.pad(each, [(0, 0), (0, 0), (0, 3), (0, 0), (0, 0)])[:, :, :8] for each in sent.staged[:2]]
    cut = [Heads(*(each[start:stop] for each in room), start) for start, stop in ((0, 1), (1, len(room[0])))]
    here.links.post("d0", sent._replace(staged=cut))
    assert same(there.get(), sent) and way.went(here, 1)


def test_a_part_that_is_not_what_its_checksums_say_comes_without_blocks_and_the_next_one_whole(pair, monkeypatch):
    here, there = pair
    header_of = connection.parts.header_of
    monkeypatch.setattr(
        connection.parts, "header_of", lambda part, sums: header_of(part, [each + 1 for each in sums])
    )
    here.links.post("d0", part(1))
    assert same(there.get(), part(1)._replace(staged=None)) and there.counts["damaged"] == 1
    monkeypatch.undo()
    assert crosses(here, there, part(1)) and here.counts["ended"] == there.counts["ended"] == 0


def test_what_arrives_cannot_be_written_and_nothing_later_changes_it(pair):
    here, there = pair
    held = []
    for number in range(30):
        here.links.post("d0", part(number, 4))
        held.append(there.get())
        if number % 3 == 2:
            del held[0]
    assert all(same(each, part(each.handoff, 4)) for each in held) and len(held) == 20
    with pytest.raises(ValueError, match="read-only"):
        held[0].staged[0][:] = 0


def test_many_at_once_from_many_threads_all_cross(pair):
    here, there = pair
    sent = [part(number) for number in range(40)]
    threads = [
        threading.Thread(target=lambda mine=sent[start::4]: [here.links.post("d0", each) for each in mine])
        for start in range(4)
    ]
    for thread in threads:
        thread.start()
    found = [there.get() for _ in sent]
    for thread in threads:
        thread.join()
    assert all(same(each, sent[each.handoff]) for each in found) and len({each.handoff for each in found}) == 40


def test_arrays_outlive_their_connection_and_its_process_goes_on(way, pair):
    here, there = pair
    here.links.post("d0", part(1))
    held = there.get()
    here.close()
    until(lambda: there.counts["ended"] >= 2)
    again = way.end("p1")
    again.links.meet("d0", there.links.addresses[0])
    assert crosses(again, there, part(2)) and same(held, part(1))
    there.close()
    assert same(held, part(1))


def test_a_process_that_is_killed_amid_parts_takes_nothing_along_and_the_next_one_gets_them(way):
    if way.name == "pulled":
        pytest.skip("the stand-in for a library reads the memory of its own process alone")
    here = way.end("p0")
    with way.process("d0") as (process, address):
        here.links.meet("d0", address)
        for number in range(10):
            here.links.post("d0", part(number))
            held = here.get()
            assert same(held, part(number))
        for number in range(60):
            here.links.post("d0", part(number, 32))
        process.send_signal(signal.SIGKILL)
        process.wait()
        until(lambda: not any(channel.connections for channel in here.links._channels.values()))
        assert same(held, part(9))
        if here.mover is not None:
            until(lambda: len(here.mover.staging.slots) == 0)
    while not here.heard.empty():
        here.get()
    with way.process("d0") as (_, address):
        here.links.meet("d0", address)
        until(lambda: here.links.post("d0", Fetch(1, 2, 3, 4)) and not here.heard.empty())
        here.links.post("d0", part(50))
        while isinstance(back := here.get(), Fetch):
            pass
        assert same(back, part(50))
