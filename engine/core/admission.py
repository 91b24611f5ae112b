"""Whether a new request is let in: how long it would wait for its first token, lane by lane, and what it may.

    placed --first token--> drawing --over--> gone         each number, of a choice or a handoff's prompt, on a lane

A lane is full when more choices are placed on it than it has rows: one more then waits until enough of them are
over. It is behind when more prompt tokens are placed on it than fit into a step: one more waits until they are
computed. Both speeds are counted, each in the time alone in which its queue stood: in an idle hour nothing is
learnt of what a lane can do. The last WINDOW generations of rows count, so a speed follows what is asked.
A request is refused when the wait that one of forty would exceed is longer than it may wait: then what waits is
less than what is served in that time, in requests and in tokens. Who can start at once is never refused.
Pure: `now` is an argument. Cost: a few sums a lane and request, a dict entry a choice.
Source: Little, "A Proof for the Queuing Formula L = lambda W" (1961).
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from engine.core.messages import Load
from engine.core.roles import Role
from engine.errors import ResourceExhausted

TOKEN_S = 1e-4  # to compute one token of a prompt, where nothing better is known
WAIT_ROW_S = 0.05  # for each sequence that waits, where nothing better is known
FULL_S = 1.0  # a pool that has no room now
LATE = 2.0  # standard deviations: of forty waits one is longer
LEAST = 4  # counts from which a speed is known
WINDOW = 4  # generations of rows that a speed is of
LEAST_WINDOW = 64
UNKNOWN_PLACED = 64  # most on a lane that has not reported its rows
UNKNOWN_WAITING = 32  # most that wait for a row, or as many as there are rows, where no speed is known
UNKNOWN_PER_S = 4.0  # endings of a full lane, while its speed is not known
HINT_S = 1.0  # when to try again, where no speed is known
LEAST_HINT_S = 0.05


@dataclass(slots=True)
class Rate:
    """Amounts per second of the time in which a queue stood."""

    _clock: float = 0.0  # how long it stood
    _since: float = 0.0  # the clock where the window begins
    _sum: float = 0.0
    _counts: deque[tuple[float, float]] = field(default_factory=deque)

    def run(self, seconds: float) -> None:
        """The queue stood for so long."""
        self._clock += seconds

    def count(self, amount: float, window: int) -> None:
        """So much was done; what is older than the last `window` counts is forgotten."""
        self._counts.append((self._clock, amount))
        self._sum += amount
        while len(self._counts) > window:
            self._since, old = self._counts.popleft()
            self._sum -= old

    @property
    def counts(self) -> int:
        """What the speed rests on."""
        return len(self._counts)

    @property
    def per_s(self) -> float | None:
        """None until enough was counted."""
        seconds = self._clock - self._since
        return self._sum / seconds if len(self._counts) >= LEAST and seconds > 0.0 else None


class Wait(NamedTuple):
    """Seconds until a first token: what one of forty exceeds, infinite while unknown, and on average."""

    late_s: float
    mean_s: float


AT_ONCE = Wait(0.0, 0.0)
UNKNOWN = Wait(math.inf, HINT_S)


@dataclass(slots=True)
class Lane:
    """A lane as the router sees it. `name` is that of one life of its process: a new one has a new name."""

    name: str
    role: Role
    load: Load | None = None
    queued: int = 0  # prompt tokens sent since its last report
    retired: bool = False  # nothing new is placed there: it is about to be restarted
    placed: dict[int, int] = field(default_factory=dict)  # number -> prompt tokens, until a first token
    drawing: set[int] = field(default_factory=set)
    tokens: int = 0  # of `placed`
    ended: Rate = field(default_factory=Rate)  # choices, while the lane was full
    computed: Rate = field(default_factory=Rate)  # prompt tokens, while it was behind

    @property
    def rows(self) -> int:
        """Sequences that can run side by side: as many as run now when the pool holds no more; 0 while unknown."""
        load = self.load
        if load is None or not load.rows:
            return 0
        each = (load.blocks - load.available) / max(load.running, 1)
        crowded = load.waiting > 0 and load.available < each
        return max(min(load.rows, load.running), 1) if crowded else load.rows

    @property
    def excess(self) -> int:
        """How many more are placed than can run."""
        return len(self.placed) + len(self.drawing) - self.rows if self.rows else 0

    @property
    def behind(self) -> bool:
        """More prompt tokens wait than one step takes."""
        return self.load is not None and self.tokens > self.load.step_tokens > 0

    def place(self, number: int, tokens: int) -> None:
        """A choice or prompt goes there, of which so many tokens are to be computed."""
        self.placed[number] = tokens
        self.tokens += tokens

    def drew(self, number: int) -> None:
        """Its prompt is computed."""
        if (tokens := self.placed.get(number)) is not None:
            if self.behind and self.excess <= 0:
                self.computed.count(tokens, self._window)
            self._forget(number)
            self.drawing.add(number)

    def leave(self, number: int) -> None:
        """It is over there; unknown numbers are ignored."""
        if number in self.drawing:
            if self.excess > 0:
                self.ended.count(1, self._window)
            self.drawing.remove(number)
        elif number in self.placed:
            self._forget(number)

    def _forget(self, number: int) -> None:
        self.tokens -= self.placed.pop(number)

    @property
    def _window(self) -> int:
        return max(WINDOW * self.rows, LEAST_WINDOW)

    def run(self, seconds: float) -> None:
        """Time has passed."""
        if self.excess > 0:
            self.ended.run(seconds)
        elif self.behind:
            self.computed.run(seconds)

    def wait(self) -> Wait:
        """Until one more request draws its first token there."""
        if not self.rows:
            return AT_ONCE if len(self.placed) + len(self.drawing) < UNKNOWN_PLACED else UNKNOWN
        ahead, computed, ended = self.excess + 1, self.computed.per_s, self.ended.per_s
        computing_s = self.tokens / computed if self.behind and computed else 0.0
        if ahead <= 0 or (ended is None and ahead <= max(self.rows, UNKNOWN_WAITING)):
            return Wait(computing_s, computing_s)
        if ended is None:
            guessed_s = max(ahead / UNKNOWN_PER_S, computing_s)
            return Wait(guessed_s, guessed_s)
        late = ahead + LATE * math.sqrt(ahead + ahead**2 / self.ended.counts)  # of what comes, and of the speed
        return Wait(max(late / ended, computing_s), max(ahead / ended, computing_s))

    def wait_s(self, tokens: int, blocks: int) -> float:
        """Seconds until it has computed `tokens` more tokens of a prompt that needs `blocks`; to compare lanes."""
        queued = self.queued + tokens
        if self.load is None:
            return queued * TOKEN_S
        full = FULL_S if blocks > self.load.available else 0.0
        ended = self.ended.per_s
        rows_s = max(self.excess, 0) / ended if ended else self.load.waiting * WAIT_ROW_S
        return (queued + self.load.queued_tokens) * TOKEN_S + rows_s + full


def admit(now: float, max_wait_s: float, deadline_at: float | None, wait: Wait) -> None:
    """Let a request in that would wait so long, or raise ResourceExhausted. Without a `max_wait_s` all pass."""
    name, bound_s = "max_wait", max_wait_s
    if deadline_at is not None and deadline_at - now < bound_s:
        name, bound_s = "deadline", max(deadline_at - now, 0.0)
    if wait.late_s <= bound_s or max_wait_s == math.inf:
        return
    hint_s = max(min(wait.mean_s, max_wait_s), LEAST_HINT_S)  # no queue stands for longer
    got = "an unknown wait" if wait.late_s == math.inf else f"a wait of {wait.late_s:.3g} s for the first token"
    expected = f"at most {bound_s:.3g} s; try again in {hint_s:.3g} s"
    raise ResourceExhausted(f"{name}: got {got}; expected {expected}", field=name, retry_after_s=hint_s)


def least_wait(alone: Sequence[Lane], prefilling: Sequence[Lane], decoding: Sequence[Lane]) -> Wait:
    """Over the lanes that may serve a request: one that does it alone, or two, whose queues go on side by side."""
    ways = [lane.wait() for lane in alone]
    if prefilling:
        ways.append(max(min(lane.wait() for lane in prefilling), min(lane.wait() for lane in decoding)))
    return min(ways)
