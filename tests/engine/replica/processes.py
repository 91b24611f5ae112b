"""A lane over processes inside one: followers on threads, devices that are hashes, links on loopback."""

import contextlib
import queue
import socket
import threading
import time

import numpy as np

from engine.clock import SystemClock
from engine.core.membership import Welcome
from engine.core.messages import FRONT, Meet
from engine.core.session import Session
from engine.movers.geometry import Geometry
from engine.movers.parts import Heads
from engine.movers.spans import Span, heads_of
from engine.observe.plan_bytes import Bounds
from engine.replica.channel import Channel
from engine.replica.follower import Follower
from engine.replica.followers import Followers, Lockstep
from engine.replica.joined import Life
from engine.replica.moves import Bytes, Reach
from engine.sim.runner import ModelledRunner

BLOCKS, BLOCK, ROWS, CONTEXT, VOCAB, STEP_TOKENS = 40, 4, 4, 64, 997, 32
BOUNDS = Bounds(BLOCKS, BLOCK, ROWS, CONTEXT, STEP_TOKENS, VOCAB)
SECRET = bytes(range(32))
WAIT_S = 10.0


class Lost(Exception):
    """Said where a process would end."""


class Losses:
    """What `lost` was told; it does not return."""

    def __init__(self):
        self.said = queue.Queue()

    def __call__(self, reason):
        self.said.put(reason)
        if threading.current_thread() is threading.main_thread():
            raise Lost(reason)
        raise SystemExit  # of this thread

    def next(self):
        return self.said.get(timeout=WAIT_S)


def device():
    return ModelledRunner(BLOCKS, BLOCK, ROWS, CONTEXT, VOCAB)


def content_of(kv_heads, span, rank):
    """A device has one hash a position; on the way every head of a process has it, changed by the head's number."""
    first, stop = heads_of(kv_heads, span, rank)

    def leave(staged, count):
        keys = np.stack([staged[:count] + head for head in range(first, stop)])[:, None, :, :, None]
        return tuple(Heads(keys[k : k + 1], -keys[k : k + 1], first + k) for k in range(stop - first))

    def arrive(heads):
        assert (heads.first_head, heads.stop_head) == (first, stop), "the heads of another process"
        assert (heads.keys_KLnCH == -heads.values_KLnCH).all()
        found = [keys[0, :, :, 0] - head for head, keys in enumerate(heads.keys_KLnCH, first)]
        assert all((each == found[0]).all() for each in found), "heads changed places"
        return found[0]

    return Bytes(leave, arrive)


class StubLane:
    """What a life has of a lane: it hears, and is told to stop."""

    def __init__(self, name):
        self.name, self.heard, self._over = name, queue.Queue(), threading.Event()
        self.turned_at = time.monotonic()

    def connect(self, post):
        """Nobody asks it to say anything."""

    def hear(self, sender, message):
        self.heard.put((sender, message))

    def run(self):
        self._over.wait()

    def stop(self):
        self._over.set()


class Processes:
    """The processes of lane `slot`. `devices[0]` is the leader's; `lockstep` has all of them."""

    def __init__(self, slot, span, kv_heads=1):
        self.slot, self.span, self.kv_heads = slot, span, kv_heads
        self.losses, self.lost_there = Losses(), [Losses() for _ in range(1, span.processes)]
        self.devices = [device() for _ in range(span.processes)]
        self.geometry = Geometry(1, kv_heads, 1, "int64", BLOCK, "hash", "invariant")
        self.reach = Reach("127.0.0.1:9", ["127.0.0.1:0"], SECRET, self.geometry)  # nobody is the front
        self.sockets, self.followers_there, self._threads = [], [], []
        channels = [self._follow(rank) for rank in range(1, span.processes)]
        self.followers = Followers(channels, self.losses)
        self.lockstep = Lockstep(self.devices[0], self.followers, self.losses) if channels else self.devices[0]
        self.life = None

    def _follow(self, rank):
        ours, theirs = socket.socketpair()
        self.sockets += [ours, theirs]
        about = self.reach, content_of(self.kv_heads, self.span, rank), SystemClock(), self.lost_there[rank - 1]
        there = Follower(Channel(theirs, "the leader"), rank, self.span, self.devices[rank], BOUNDS, *about)
        self.followers_there.append(there)
        self._threads.append(threading.Thread(target=there.run, daemon=True))
        self._threads[-1].start()
        return Channel(ours, f"follower {rank}")

    def live(self, name):
        """A life of this name, as worker processes have it."""
        about = self.reach, content_of(self.kv_heads, self.span, 0), SystemClock(), self.span, self.followers
        self.life = Life(name, "both", lambda name, courier: StubLane(name), *about)
        self.front = Session(7, time.monotonic())
        self.life._hear(FRONT, Welcome(name, 7))
        return self.life

    @property
    def addresses(self):
        return self.life._member._hello.addresses

    def meets(self, other, foreign=False):
        """What the front says to introduce another lane."""
        self.hears(Meet(other.life.lane.name, other.addresses, other.span.tp, foreign))

    def hears(self, message):
        """From the front."""
        for packet in self.front.send(time.monotonic(), message):
            self.life._hear(FRONT, packet)

    def settle(self):
        """Until every follower has carried out what it was told."""
        for there in self.followers_there:
            until(lambda there=there: there._number == self.followers._number)

    def close(self):
        if self.life is not None:
            self.life.end()
        self.followers.close()
        for thread in self._threads:
            thread.join(WAIT_S)
            assert not thread.is_alive()
        for there in self.followers_there:
            if there._moves is not None:
                there._moves.close()
        for each in self.sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()


def until(holds):
    end = time.monotonic() + WAIT_S
    while not holds():
        assert time.monotonic() < end, "it did not come to hold"
        time.sleep(0.002)


ALONE = Span(1, 1)
