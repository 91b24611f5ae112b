"""A cluster without faults that is asked for more than it can do, in virtual time, on the production classes.

    closed: so many clients, each asks again when it was answered        -> capacity, requests a second
    open:   arrivals by chance at a rate, whatever becomes of them       -> goodput: in time and whole, a second

A step's time grows with its tokens, so that rows and prompts both cost. The judge of the simulator holds every
answer against the lone one; what is refused is counted, and when its client was told to come again.
Cost: about 2 s a virtual minute and lane.
"""

import heapq
import random
from dataclasses import dataclass, field
from typing import NamedTuple

from engine.core.journeys import Drawn, Ended, Journey
from engine.core.plan import StepPlan
from engine.core.request import Request, Sampling, Stopping
from engine.core.roles import Role
from engine.errors import ResourceExhausted
from engine.sim.traffic import VOCAB
from engine.sim.world import Process, World

STEP_S, TOKEN_S = 0.03, 0.0005  # a step, and each of its tokens
ROWS, STEP_TOKENS, BLOCKS = 16, 48, 512
PROMPT, ANSWER = (4, 32), (4, 28)  # tokens, drawn evenly
JOIN_S = 1.0  # by then the lanes are there


class Machine(Process):
    """A lane whose steps take as long as their tokens ask."""

    def start(self) -> None:
        """Of one size, whatever was drawn."""
        self.blocks, self.rows, self.tokens = BLOCKS, ROWS, STEP_TOKENS
        super().start()

    def step_s(self, plan: StepPlan) -> float:
        """By its tokens."""
        return STEP_S + TOKEN_S * plan.num_tokens


class Told(NamedTuple):
    """A refusal: when, and in how many seconds to come again."""

    at: float
    retry_s: float


@dataclass(slots=True)
class Seen:
    """What clients saw. Waits are from the asking to the first token."""

    asked: int = 0
    refused: list[Told] = field(default_factory=list)
    waits: dict[Journey, float] = field(default_factory=dict)
    asked_at: dict[Journey, float] = field(default_factory=dict)
    ended_at: dict[Journey, float] = field(default_factory=dict)
    longest_queue: int = 0  # requests without a first token
    longest_queue_tokens: int = 0

    def good(self, since: float, until: float, within_s: float) -> float:
        """Requests a second that ended whole in this time, their first token having come `within_s`."""
        ended = [journey for journey, at in self.ended_at.items() if since < at <= until]
        return sum(self.waits[journey] <= within_s for journey in ended) / (until - since)


class Crowd(World):
    """Clients that ask a cluster of lanes of these roles; `run_until` lets time pass."""

    def __init__(self, seed: int, roles: tuple[Role, ...], max_wait_s: float):
        self.seen = Seen()
        self._waiting: dict[Journey, None] = {}
        self._requests = random.Random(seed + 1)
        self._again = False
        super().__init__(seed, requests=0, calm=True)
        self._heap.clear()
        self.processes = [Machine(self, f"{role[0]}{k}", role, self.rng) for k, role in enumerate(roles)]
        self.router.max_wait_s = max_wait_s
        self._front_tick()
        self.run_until(JOIN_S)

    def closed(self, clients: int) -> None:
        """So many clients from now on, each with one request at a time."""
        self._again = True
        for _ in range(clients):
            self._ask_one()

    def open(self, rate: float, seconds: float) -> None:
        """Requests arrive at `rate` a second for so long."""
        until = self.now + seconds

        def arrive() -> None:
            if self.now < until:
                self._ask_one()
                self.at(self.now + self._requests.expovariate(rate), arrive)

        arrive()

    def run_until(self, until: float) -> None:
        """Let time pass."""
        while self._heap and self._heap[0][0] <= until:
            self.now, _, action = heapq.heappop(self._heap)
            action()
            self.events += 1
        self.now = until

    def _ask_one(self) -> None:
        draw, seen = self._requests, self.seen
        ids = tuple(draw.choices(range(VOCAB - 1), k=draw.randint(*PROMPT)))
        stopping = Stopping(max_tokens=draw.randint(*ANSWER), ignore_eos=True)
        request = Request(f"r{seen.asked}", ids, Sampling(seed=draw.randrange(1000)), stopping)
        seen.asked += 1
        try:
            journey = self.router.submit(request, 0, self.now)
        except ResourceExhausted as error:
            assert error.retry_after_s is not None
            seen.refused.append(Told(self.now, error.retry_after_s))
            return
        seen.asked_at[journey] = self.now
        self._waiting[journey] = None
        seen.longest_queue = max(seen.longest_queue, len(self._waiting))
        tokens = sum(len(each.request.prompt_ids) for each in self._waiting)
        seen.longest_queue_tokens = max(seen.longest_queue_tokens, tokens)
        self._front_says()

    def _front_says(self) -> None:
        seen, again = self.seen, 0
        for event in self.router.events:
            if isinstance(event, Drawn):
                for _, track in event.entries:
                    if self._waiting.pop(track.journey, self) is None:
                        seen.waits[track.journey] = self.now - seen.asked_at[track.journey]
            elif isinstance(event, Ended):
                assert event.reason == "length", f"ended by {event.reason}"
                seen.ended_at[event.track.journey] = self.now
                again += self._again
        super()._front_says()
        for _ in range(again):
            self._ask_one()


def capacity(roles: tuple[Role, ...], seconds: float, seed: int = 0) -> float:
    """Requests a second that a cluster does when there is always more to do."""
    crowd = Crowd(seed, roles, float("inf"))
    crowd.closed(4 * ROWS * len(roles))
    since = crowd.now + seconds / 6
    crowd.run_until(crowd.now + seconds)
    return crowd.seen.good(since, crowd.now, float("inf"))


def overload(roles: tuple[Role, ...], rate: float, seconds: float, max_wait_s: float, seed: int = 0) -> Seen:
    """What clients see that ask at `rate` for so long; what was let in is served to the end."""
    crowd = Crowd(seed, roles, max_wait_s)
    crowd.open(rate, seconds)
    crowd.run_until(crowd.now + seconds)
    while crowd.router.journeys:
        crowd.run_until(crowd.now + 0.1)
    crowd.router.check()
    return crowd.seen
