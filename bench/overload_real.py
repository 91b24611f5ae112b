"""Clients of the embedded model on lanes of this process: how much it does, what it refuses and how fast.

    closed: a thread asks again for every answer        open: a thread asks at random times, whatever comes back

Answers are timed where a lane says them; a client here reads nothing but counts. The lanes, the clients and
whatever else runs on the machine share its processors.
"""

import os
import queue
import random
import time
from dataclasses import dataclass, field
from pathlib import Path

from engine.config import Settings
from engine.core.request import Request, Sampling, Stopping
from engine.errors import ResourceExhausted
from engine.replica.build import replica
from engine.replica.output import Output
from engine.replica.replica import Replica

PROMPT, ANSWER = (4, 32), (4, 28)  # tokens, drawn evenly
STEP_TOKENS, CONTEXT = 32, 128
CLIENTS_A_ROW = 4
SETTLE_S = 60.0  # by then what was let in has ended


@dataclass(slots=True)
class Seen:
    """What clients saw. refusals: (seconds until it was said, when to come again)."""

    asked: int = 0
    goodput: float = 0.0
    waits: list[float] = field(default_factory=list)
    refusals: list[tuple[float, float]] = field(default_factory=list)
    longest_queue: int = 0
    before_bytes: int = 0
    after_bytes: int = 0


def embedded(lanes: str, rows: int) -> Replica:
    """The embedded model on CPU lanes, with few programs."""
    return replica(
        Settings(
            lanes=lanes,
            device="cpu",
            max_num_seqs=rows,
            max_num_batched_tokens=STEP_TOKENS,
            max_model_len=CONTEXT,
        )
    )


@dataclass(slots=True)
class Call:
    """A request on its way."""

    asked_at: float
    first_at: float | None = None


class Crowd:
    """A replica and its clients; one run at a time."""

    def __init__(self, served: Replica, rows: int, seed: int):
        self.replica = served
        self._clients = CLIENTS_A_ROW * rows * len(served.lanes)
        self._rng, self._number = random.Random(seed), 0
        self._calls: dict[str, Call] = {}
        self._let_in = self._begun = 0  # each counted by one thread at a time
        self._ended: queue.SimpleQueue[tuple[float, float]] = queue.SimpleQueue()  # (when, how long it waited)
        self.replica.start()

    def stop(self) -> None:
        """Stop the lanes."""
        self.replica.stop()

    def closed(self, seconds: float) -> float:
        """Requests a second when there is always one more."""
        self.replica.router.max_wait_s = float("inf")
        for _ in range(self._clients):
            self._ask()
        began = time.monotonic()
        count = 0
        while (left := began + seconds - time.monotonic()) > 0:
            try:
                self._ended.get(timeout=left)
            except queue.Empty:
                break
            count += 1
            self._ask()
        took = time.monotonic() - began
        self._settle()
        return count / took

    def open(self, rate: float, seconds: float, in_time_s: float) -> Seen:
        """What clients see that ask at `rate` for so long."""
        self.replica.router.max_wait_s = in_time_s
        seen = Seen(before_bytes=resident_bytes())
        began = at = time.monotonic()
        while (at := at + self._rng.expovariate(rate)) < began + seconds:
            time.sleep(max(at - time.monotonic(), 0.0))
            self._try(seen)
        seen.after_bytes = resident_bytes()
        time.sleep(max(began + seconds - time.monotonic(), 0.0))
        ended = self._settle()
        seen.waits = [wait for _, wait in ended]
        good = sum(when <= began + seconds and wait <= in_time_s for when, wait in ended)
        seen.goodput = good / seconds
        return seen

    def _try(self, seen: Seen) -> None:
        seen.asked += 1
        asked_at = time.monotonic()
        try:
            self._ask()
        except ResourceExhausted as error:
            assert error.retry_after_s is not None
            seen.refusals.append((time.monotonic() - asked_at, error.retry_after_s))
        seen.longest_queue = max(seen.longest_queue, self._let_in - self._begun)

    def _ask(self) -> None:
        """One request. Raises ResourceExhausted."""
        rng, self._number = self._rng, self._number + 1
        name, vocab = f"r{self._number}", self.replica.info.vocab
        ids = tuple(rng.choices(range(vocab), k=rng.randint(*PROMPT)))
        stopping = Stopping(max_tokens=rng.randint(*ANSWER), ignore_eos=True)
        self._calls[name] = Call(time.monotonic())
        try:
            self.replica.submit(Request(name, ids, Sampling(temperature=0.0), stopping), self._heard)
        except ResourceExhausted:
            del self._calls[name]
            raise
        self._let_in += 1

    def _heard(self, output: Output) -> None:
        """Something came for a request; on the thread of a lane."""
        now, call = time.monotonic(), self._calls[output.request.request_id]
        output.take()
        if call.first_at is None and output.count:
            call.first_at = now
            self._begun += 1
        if output.done:
            del self._calls[output.request.request_id]
            whole = all(choice.finish is not None and choice.finish.reason == "length" for choice in output.choices)
            assert whole and call.first_at is not None, "an answer was cut"
            self._ended.put((now, call.first_at - call.asked_at))

    def _settle(self) -> list[tuple[float, float]]:
        """Wait for what still runs; everything that ended and was not fetched."""
        until = time.monotonic() + SETTLE_S
        while self._calls and time.monotonic() < until:
            time.sleep(0.02)
        assert not self._calls, f"{len(self._calls)} requests did not end within {SETTLE_S:.0f} s"
        ended = []
        while not self._ended.empty():
            ended.append(self._ended.get())
        return ended


def resident_bytes() -> int:
    """Memory of this process that is there, of Linux."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
