"""Every lane of a cluster is restarted under load, one after another: no stream is dropped, doubled or wrong.

The processes, their keepers and the front are those that serve; the device is a hash. `-s` prints what it took.
"""

import os
import sys
import threading
import time

import pytest

from engine.cluster.process import Command
from engine.cluster.reading import of_lanes
from engine.config import Settings
from engine.core.request import Request, Sampling, Stopping
from engine.errors import InvalidArgument, NotReady
from engine.front import Front
from engine.replica.loads import DRAINING, READY, STARTING
from engine.replica.replica import Replica
from tests.faults.cluster import SEED, Answer
from tests.faults.served import Asked, Served, alone

STREAMS = 6
LONG = 180  # tokens of a stream that ends long after its lane is asked to
ROLLING_S = 120.0
ROUNDS = int(os.environ.get("SERAC_ROUNDS", "1"))  # of the embedded model


class Rolled:
    """A front over real processes of the lanes that are named, in a folder of the test."""

    def __init__(self, lanes: str, folder):
        self.topology, self.folder = of_lanes(lanes), folder
        environment = {**os.environ, "PYTHONPATH": os.getcwd()}
        commands = {}
        for lane in self.topology.lanes:
            words = "tests.faults.lined", lane.name, lane.role, str(folder)
            arguments = [sys.executable, "-m", *words]
            commands[lane.name, 0] = Command(arguments, environment)
        self.replica: Replica = Front(Settings(max_wait=60.0), self.topology, commands).start(lambda *_: None)
        self.replica._seeds = lambda: SEED
        self.answers: list[Answer] = []
        self.steps: list[tuple[str, str, float]] = []

    def ask(self, tokens: int = 60) -> Answer:
        number = len(self.answers)
        prompt = tuple(1 + (7 * number + k) % 900 for k in range(20 + number % 30))
        sampling, stopping = Sampling(temperature=1.0), Stopping(max_tokens=tokens, ignore_eos=True)
        answer = Answer(self, Request(f"r{number}", prompt, sampling, stopping))
        self.answers.append(answer)
        answer.output = self.replica.submit(answer.request, answer.take)
        return answer

    def tell(self, lane: str, state: str, message: str) -> None:
        self.steps.append((lane, state, time.monotonic()))
        print(f"{lane}: {state}, {message}")

    def names(self) -> dict[str, str]:
        return {name.split(".")[0]: name for name in list(self.replica.router.lanes)}

    def roll(self, drain_s: float, lanes=(), tokens: int = 60) -> list[str]:
        """Restart lanes while STREAMS streams are always open; the order in which they came back."""
        before, first, failed = self.names(), len(self.steps), []

        def restart() -> None:
            try:
                self.replica.restart(lanes, drain_s, self.tell, threading.Event())
            except Exception as error:  # told below
                failed.append(error)

        while sum(not answer.ended for answer in self.answers) < STREAMS:
            self.ask(tokens)
        thread = threading.Thread(target=restart)
        thread.start()
        until = time.monotonic() + ROLLING_S
        while thread.is_alive() and time.monotonic() < until:
            for _ in range(STREAMS - sum(not answer.ended for answer in self.answers)):
                self.ask(tokens)
            time.sleep(0.02)
        thread.join(1.0)
        assert not thread.is_alive() and not failed, failed
        changed = {slot for slot, name in self.names().items() if before.get(slot) != name}
        assert changed == set(lanes or before), "each has a new life"
        return [lane for lane, state, _ in self.steps[first:] if state == READY]

    def whole(self) -> None:
        """Every stream ended by itself with just the tokens of the same request alone."""
        until = time.monotonic() + 30.0
        while not all(answer.ended for answer in self.answers) and time.monotonic() < until:
            time.sleep(0.02)
        reasons = {finish.reason for answer in self.answers for finish in answer.finish.values()}
        assert all(answer.ended for answer in self.answers) and reasons == {"length"}
        assert all(answer.right() for answer in self.answers)
        assert self.replica.router.gaps == 0
        self.replica.router.check()

    def seconds(self) -> list[float]:
        """From each lane's first step to its last."""
        began, took = {}, []
        for lane, state, at in self.steps:
            began.setdefault(lane, at)
            if state == READY:
                took.append(at - began.pop(lane))
        return took


@pytest.fixture
def roll(tmp_path):
    made = []

    def start(lanes: str) -> Rolled:
        made.append(Rolled(lanes, tmp_path))
        return made[-1]

    yield start
    for each in made:
        each.replica.stop()


def report(rolled: Rolled) -> None:
    took = rolled.seconds()
    print(
        f"\n{len(took)} restarts of {min(took):.2f} to {max(took):.2f} s, {len(rolled.answers)} streams, "
        f"{rolled.replica.router.recoveries} went on elsewhere"
    )


def test_no_stream_is_dropped_while_every_lane_is_restarted_one_after_another(roll):
    rolled = roll("prefill:tp=1, decode:tp=1*2")
    assert rolled.roll(30.0) == ["d1", "d2", "p0"], "the only one of its role comes last"
    assert rolled.replica.router.recoveries == 0, "each lane ended what it served"
    rolled.whole()
    assert rolled.roll(0.0, ["d1"], LONG) == ["d1"]
    rolled.whole()
    assert rolled.replica.router.recoveries > 0, "streams were moved while they ran"
    report(rolled)


def test_requests_for_the_only_lane_wait_for_its_next_life_and_nothing_else_is_restarted_meanwhile(roll, tmp_path):
    rolled = roll("both:tp=1")
    with pytest.raises(InvalidArgument, match="lanes: got 'b7'; expected some of b0"):
        rolled.replica.restart(["b7"], 0.0, rolled.tell, threading.Event())
    seen = []

    def tell(lane, state, message):
        seen.append((state, rolled.replica.lane_loads()[0].state))
        if state == STARTING and len(rolled.answers) == 1:
            with pytest.raises(NotReady, match="another one is under way"):
                rolled.replica.restart([], 0.0, rolled.tell, threading.Event())
            assert rolled.replica.ready
            rolled.ask(5)

    rolled.ask(5)
    rolled.replica.restart([], 5.0, tell, threading.Event())
    rolled.whole()
    assert {(DRAINING, DRAINING), (STARTING, STARTING), (READY, READY)} <= set(seen)
    (load,) = rolled.replica.lane_loads()
    (process,) = load.standing.processes
    assert (process.host, process.state) == ("localhost", READY) and load.standing.restarts == 1
    (tmp_path / "b0.broken").write_text("serac: error: mesh: got tp=9; expected 1")
    with pytest.raises(NotReady, match="lane b0: it does not come back"):
        rolled.replica.restart([], 0.0, rolled.tell, threading.Event())
    assert not rolled.replica.ready
    with pytest.raises(NotReady, match="lane b0: it is not ready; serac status says"):
        rolled.replica.restart([], 0.0, rolled.tell, threading.Event())


@pytest.mark.slow
@pytest.mark.parametrize("drain_s", [30.0, 0.0], ids=["drained", "at once"])
def test_ten_rolling_restarts_of_every_lane_drop_nothing(roll, drain_s):
    """Costs half a minute each: thirty restarts of a process."""
    rolled = roll("prefill:tp=1, decode:tp=1*2")
    for _ in range(10):
        rolled.roll(drain_s, tokens=LONG)
    rolled.whole()
    report(rolled)


@pytest.mark.slow
def test_the_embedded_model_goes_on_token_for_token_while_every_lane_is_restarted(tmp_path):
    """Costs eight minutes where others compute too: four lanes compile, and then each again, SERAC_ROUNDS times."""
    kinds = [{"temperature": 0.0}, {"temperature": 1.0, "seed": 7}]
    prompts = ["def read(self, path):\n", "import os\nimport sys\n\n\nclass Reader:\n" * 3]
    asked = [(prompt, kind | {"max_tokens": 90, "ignore_eos": True}) for prompt in prompts for kind in kinds]
    served, wanted = Served("prefill:tp=1*2, decode:tp=1*2", 2, tmp_path / "log"), alone(2, asked)
    try:
        answers, open_, ended = [], [], threading.Event()

        def load() -> None:
            while not ended.is_set():
                open_[:] = [Asked(served, prompt, **options) for prompt, options in asked]
                answers.append([answer.result() for answer in open_])

        thread = threading.Thread(target=load)
        thread.start()
        began, steps = time.monotonic(), []
        try:
            for _ in range(ROUNDS):
                for step in served.client.restart(drain_s=2.0):
                    steps.append((step.lane, step.state))
                    print(f"{time.monotonic() - began:.1f} s: {step.lane} {step.state}, {step.message}", flush=True)
        finally:
            ended.set()
            thread.join()
        assert [lane for lane, state in steps if state == READY] == ROUNDS * ["p0", "p1", "d2", "d3"]
        assert answers and all(each == wanted for each in answers)
        print(f"{len(answers) * len(asked)} streams, {served.client.load()['recoveries']:.0f} went on elsewhere")
    finally:
        assert served.close() == 0
