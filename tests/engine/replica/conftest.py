"""A whole replica around a device that is a hash, under a clock that stands still, turned by hand."""

import threading

import pytest
from prometheus_client import CollectorRegistry

from engine import embedded
from engine.clock import ManualClock
from engine.core import prefix
from engine.core.agent import Agent
from engine.core.request import Limits, Request, Sampling, Stopping
from engine.core.roles import Role
from engine.core.scheduler import LaneShape, Scheduler
from engine.core.sequence import Part, sequences
from engine.observe.metrics import Metrics
from engine.replica.lane import Lane
from engine.replica.replica import ModelInfo, Replica
from engine.sim.runner import ModelledRunner, alone
from engine.text.text import Text

CONTEXT, BLOCK, BLOCKS = 512, 16, 129


class Life:
    """A replica, its clock, and what every request said so far."""

    def __init__(self, text: Text, roles: tuple[Role, ...] = ("both",), max_open: int = 100):
        self.text, self.clock = text, ManualClock()
        limits = Limits(text.vocab, CONTEXT, (BLOCKS - 1) * BLOCK, BLOCK, ())
        info = ModelInfo("test", "r1", CONTEXT, text.vocab, (), {})
        self.metrics = Metrics(CollectorRegistry())
        self.replica = Replica(info, text, limits, self.clock, self.metrics, seeds=lambda: 11, max_open=max_open)
        self.devices = []
        for index, role in enumerate(roles):
            device = ModelledRunner(BLOCKS, BLOCK, 8, CONTEXT, text.vocab)
            scheduler = Scheduler(LaneShape(BLOCKS, BLOCK, 8, 64, CONTEXT, text.vocab), prefix.root("test"))
            self.devices.append(device)
            agent = Agent(f"{role[0]}{index}", scheduler)
            self.replica.add_lane(Lane(agent, device, self.clock, self.metrics, self), role)
        self.deltas: dict[str, list] = {}

    def send(self, sender, receiver, part):
        """Carry a part to another lane at once, as a courier would a little later."""
        lane = next(lane for lane in self.replica.lanes if lane.name == receiver)
        lane.hear(sender, part)

    def alone(self, output, count, choice=0):
        """What a choice of the output draws when nothing else exists."""
        part, request = Part(0, choice), output.request
        (sequence,) = sequences(request, (part,), 11, CONTEXT, (), b"")
        return alone(list(request.prompt_ids), sequence.draw, count, self.text.vocab)

    def request(self, name="a", prompt="def main(", deadline_at=None, **options) -> Request:
        ids = tuple(self.text.encode(prompt)) if isinstance(prompt, str) else tuple(prompt)
        stopping = {key: options.pop(key) for key in list(options) if key in Stopping.__dataclass_fields__}
        return Request(name, ids, Sampling(**options), Stopping(**stopping), deadline_at)

    def submit(self, name="a", reads=True, paired="", **options):
        self.deltas[name] = []
        notify = (lambda output: self.read(output)) if reads else (lambda output: None)
        return self.replica.submit(self.request(name, **options), notify, paired)

    def read(self, output):
        self.deltas[output.request.request_id] += output.take()
        self.replica.taken(output)

    def turn(self, times=1):
        for _ in range(times):
            for lane in self.replica.lanes:
                lane.turn()

    def run(self):
        for lane in self.replica.lanes:
            while lane.turn():
                pass
        return self

    def whole(self, name, index=0):
        """(text, ids, finish) of one choice."""
        deltas = [delta for delta in self.deltas[name] if delta.index == index]
        finishes = [delta.finish for delta in deltas if delta.finish is not None]
        assert len(finishes) <= 1 and (not finishes or deltas[-1].finish is finishes[0]), "one terminal, last"
        ids = [token for delta in deltas for token in delta.token_ids]
        return "".join(delta.text for delta in deltas), ids, finishes[0] if finishes else None

    @property
    def restored(self):
        return all(lane.agent.scheduler.pool.available == BLOCKS - 1 for lane in self.replica.lanes)


@pytest.fixture(scope="session")
def text():
    return Text(embedded.folder())


@pytest.fixture
def life(text):
    return Life(text)


@pytest.fixture
def make_life(text):
    return lambda **options: Life(text, **options)


@pytest.fixture
def ending_threads(monkeypatch):
    """SystemExit ends a thread without a word, as Python has it and pytest has not."""
    hook = threading.excepthook
    monkeypatch.setattr(threading, "excepthook", lambda it: None if it.exc_type is SystemExit else hook(it))
