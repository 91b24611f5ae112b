"""A front in this process and lanes in real ones, to be killed, stopped and cut off."""

import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

from prometheus_client import CollectorRegistry

from engine import embedded
from engine.clock import SystemClock
from engine.core import prefix
from engine.core.messages import FRONT
from engine.core.request import Limits, Request
from engine.core.sequence import Part, sequences
from engine.movers.links import Links
from engine.movers.tls import Tls
from engine.observe.metrics import Metrics
from engine.replica.replica import ModelInfo, Replica
from engine.sim.runner import alone
from engine.text.text import Text
from tests.faults.worker import BLOCK, BLOCKS, CONTEXT, EOS, VOCAB

SEED = 5


class Cluster:
    """`slots` by name, each with its role. `way(slot, address)` may put a proxy in front of the front.

    `listen` and `tls` are the front's, `there(slot, command)` is the command on the slot's own host.
    """

    def __init__(
        self,
        slots: dict[str, str],
        way=lambda slot, address: address,
        listen: str = "127.0.0.1:0",
        tls: Tls | None = None,
        there=lambda slot, command: command,
    ):
        self.slots, self.way, self.there, self.secret = slots, way, there, secrets.token_bytes(32)
        limits = Limits(VOCAB, CONTEXT, (BLOCKS - 1) * BLOCK, BLOCK, (EOS,))
        info = ModelInfo("hash", "r1", CONTEXT, VOCAB, (EOS,), {})
        self.replica = Replica(
            info, Text(embedded.folder()), limits, SystemClock(), Metrics(CollectorRegistry()),
            prefix.root("hash"), seeds=lambda: SEED,
        )  # fmt: skip
        links = Links(FRONT, self.secret, self._hear, self._gone, tls=tls)
        links.start([listen])
        self.replica.serve_remote(links)
        self.processes: dict[str, subprocess.Popen] = {}
        self.answers: dict[str, Answer] = {}
        for slot in slots:
            self.start(slot)
        self.wait(lambda: len(self.lanes) == len(slots), 20.0)

    def _hear(self, sender, message) -> None:
        self.replica.remote.hear(sender, message)

    def _gone(self, peer) -> None:
        self.replica.remote.gone(peer)

    def start(self, slot: str) -> None:
        front = self.way(slot, self.replica.remote.links.addresses[0])
        command = [sys.executable, "-m", "tests.faults.worker", slot, self.slots[slot], front, self.secret.hex()]
        environment = {**os.environ, "PYTHONPATH": os.getcwd()}
        self.processes[slot] = subprocess.Popen(
            self.there(slot, command), stdout=subprocess.DEVNULL, env=environment
        )

    def kill(self, slot: str) -> None:
        self.processes[slot].kill()
        self.processes[slot].wait()

    def pause(self, slot: str, seconds: float) -> None:
        """Stop a process and let it go on later."""
        process = self.processes[slot]
        process.send_signal(signal.SIGSTOP)
        threading.Timer(seconds, lambda: process.send_signal(signal.SIGCONT)).start()

    @property
    def lanes(self) -> dict:
        return self.replica.router.lanes

    def lane(self, slot: str):
        """The slot's present name, None while it has none."""
        return next((name for name in list(self.lanes) if name.split(".")[0] == slot), None)

    def ask(self, request: Request) -> "Answer":
        answer = self.answers[request.request_id] = Answer(self, request)
        answer.output = self.replica.submit(request, answer.take)
        return answer

    def wait(self, what, seconds: float) -> float:
        """Until `what()`; the seconds it took. Fails when it takes longer than `seconds`."""
        began = time.monotonic()
        while not what():
            assert time.monotonic() - began < seconds, f"not within {seconds} s"
            time.sleep(0.01)
        return time.monotonic() - began

    @property
    def restored(self) -> bool:
        """Every lane says that all of its blocks are free."""
        loads = [lane.load for lane in self.lanes.values()]
        return all(
            load is not None and load.available == load.blocks and not load.writing and not load.waiting
            for load in loads
        )

    def close(self) -> None:
        for process in self.processes.values():
            process.send_signal(signal.SIGCONT)
            process.kill()
            process.wait()
        self.replica.stop()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class Answer:
    """What came of a request; `right` holds it against the same request alone."""

    def __init__(self, cluster: Cluster, request: Request):
        self.request, self.cluster, self.output = request, cluster, None
        self.tokens: dict[int, list[int]] = {k: [] for k in range(request.sampling.n)}
        self.finish: dict[int, object] = {}

    def take(self, output) -> None:
        for delta in output.take():
            assert delta.index not in self.finish, "something after the terminal"
            self.tokens[delta.index] += delta.token_ids
            if delta.finish is not None:
                self.finish[delta.index] = delta.finish
        self.cluster.replica.taken(output)

    @property
    def ended(self) -> bool:
        return len(self.finish) == self.request.sampling.n

    def right(self) -> bool:
        """Whole and token for token, or, when it was cut, a beginning."""
        for choice, tokens in self.tokens.items():
            (sequence,) = sequences(self.request, (Part(1, choice),), SEED, CONTEXT, (EOS,), b"")
            count = sequence.limit - sequence.prompt_length
            draw = replace(sequence.draw, choice=choice)
            want = alone(list(self.request.prompt_ids), draw, count, VOCAB)
            stops = [k for k, token in enumerate(want) if token in sequence.stop_ids]
            want = want[: stops[0] + 1] if stops else want
            whole = self.finish[choice].reason in ("length", "stop")
            if tokens != (want if whole else want[: len(tokens)]):
                return False
        return True
