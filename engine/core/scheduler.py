"""Chooses what the next step computes, and settles what a step brought. Counts tokens and blocks; touches neither.

There is no prefill phase and no decode phase in the rule: a sequence knows `length` tokens and has KV for
`computed` of them, and a step moves `computed` towards `length`. Running rows that miss one token are served first,
all at once; what is left of the token budget goes to prompts, oldest first, then to waiting sequences. One is
seated with blocks for every token it knows, so that only decodes can run short; then the youngest is preempted.

    submit -> plan -> (device) -> collect       plan N+1 is made while step N runs
    blocks dropped while a step is in flight are in `limbo` until the last step launched before is collected
    preemption and trials wait until nothing is in flight: rare, and then nothing is uncertain

After a device failure (`fail`) every sequence waits again with its known tokens; those of the failing step are
suspects, tried alone one after the other, and one whose lone step fails again ends alone.
Source: the note in vLLM `v1/core/sched/scheduler.py::Scheduler.schedule` for the one rule.
"""

import heapq
from collections import deque
from collections.abc import Sequence as PySequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from engine.core import prefix
from engine.core.blocks import BlockPool
from engine.core.events import Computed, Ended, Event, Started
from engine.core.plan import BLOCK, Load, StepPlan, StepResult
from engine.core.request import Request
from engine.core.reservations import Reservations
from engine.core.rows import NOBODY, Cohort, Picked, Rows
from engine.core.sequence import Part, Sequence, State, sequences
from engine.core.settle import settle
from engine.core.waiting import Waiting
from engine.errors import DeadlineExceeded, DeviceError, SeracError


@dataclass(frozen=True, slots=True)
class LaneShape:
    """Sizes of one lane. max_tokens >= max_rows, so that every running row can decode in one step."""

    num_blocks: int
    block_size: int
    max_rows: int
    max_tokens: int
    max_length: int
    vocab: int
    eos_ids: tuple[int, ...] = ()
    prefix_cache: bool = True


class Chunk(NamedTuple):
    """Tokens of one prompt in a plan; its points are `first_point` and on."""

    sequence: Sequence
    start: int
    size: int
    score: int
    draw: int
    first_point: int

    @property
    def end(self) -> int:
        """Positions computed after the step."""
        return self.start + self.size

    @property
    def line(self) -> tuple[int, ...]:
        """Its row of the plan."""
        return self.sequence.row, self.start, self.size, 0, self.score, self.draw


@dataclass(slots=True)
class Draft:
    """A plan in the making: what it holds beside decodes, and what it may still take."""

    tokens_left: int
    points_left: int
    num_points: int
    chunks: list[Chunk] = field(default_factory=list)


class Flight(NamedTuple):
    """A plan in flight: which rows draw, who sat in them, where their points are; and its chunks."""

    plan: StepPlan
    era: int
    rows: Picked
    serials: np.ndarray  # int64, one a drawing row
    points: Picked
    chunks: list[Chunk]


class Scheduler:
    """One lane's brain. Not thread-safe: one thread calls it."""

    def __init__(self, shape: LaneShape, root: bytes):
        assert shape.max_tokens >= shape.max_rows
        self.shape, self.root = shape, root
        self.pool = BlockPool(shape.num_blocks)
        self.reserved = Reservations(self.pool)
        self.rows = Rows(shape.max_rows, shape.max_length, shape.block_size, shape.vocab, shape.eos_ids)
        self.waiting = Waiting()
        self.running: dict[int, Sequence] = {}  # by serial, oldest admission first
        self.prefilling: dict[int, Sequence] = {}  # by serial; running, its known tokens not all planned
        self.flights: deque[Flight] = deque()
        self.events: list[Event] = []
        self.limbo: deque[tuple[int, list[int]]] = deque()
        self.suspects: deque[Sequence] = deque()
        self.live: dict[int, Sequence] = {}
        self.ahead: int | None = None  # number of a handoff that waits for blocks: who came later gets none
        self.preemptions = self.prompt_tokens = self.cached_tokens = 0
        self._deadlines: list[tuple[float, int]] = []
        self._loads: dict[int, Load] = {}  # by row, of those taken since the last plan
        self._serial = self._step = 0
        self._draining = False

    # -- what the outside asks ------------------------------------------------------------------------------------

    def submit(self, request: Request, seed: int, parts: PySequence[Part] = ()) -> list[Sequence]:
        """Queue a request that `check_request` has passed: a sequence a choice. `seed` serves it if it has none.

        parts   which choices, under which serials, never used before here; all, numbered by this lane, if empty
        """
        if not parts:
            parts = [Part(self._serial + choice, choice) for choice in range(request.sampling.n)]
            self._serial += len(parts)
        parent = prefix.start(self.root, request.adapter, request.salt)
        group = sequences(request, parts, seed, self.shape.max_length, self.shape.eos_ids, parent)
        for sequence in group:
            self.live[sequence.serial] = sequence
            if request.deadline_at is not None:
                heapq.heappush(self._deadlines, (request.deadline_at, sequence.serial))
        self.waiting.append(group[0])
        return group

    def cancel(self, sequence: Sequence, reason: str = "abort", error: SeracError | None = None) -> bool:
        """End `sequence` now, wherever it is; False when it is over already."""
        if sequence.state is State.ENDED:
            return False
        self._end(sequence, reason, error=error)
        return True

    def hold(self, sequence: Sequence, held: bool) -> None:
        """Stop or go on serving a sequence whose client does not read; it keeps its row and blocks."""
        sequence.held = held
        if sequence.state is State.RUNNING and sequence.serial not in self.prefilling:
            if held:
                self.rows.target[sequence.row] = 0
            else:
                self.rows.open(sequence.row)

    def blocks_of(self, sequence: Sequence) -> list[int]:
        """The blocks that hold its KV, in order of position."""
        return sequence.blocks if sequence.row < 0 else self.rows.blocks(sequence.row)

    def blocks_for(self, sequence: Sequence) -> int:
        """How many blocks hold all that it knows, found by prefix or not."""
        return -(-(len(sequence.tokens) - sequence.rests) // self.shape.block_size)

    def take_events(self) -> list[Event]:
        """What happened since the last call, in order."""
        taken, self.events = self.events, []
        return taken

    @property
    def queued_tokens(self) -> int:
        """Prompt tokens that no step computes yet."""
        queued = sum(len(sequence.tokens) - sequence.computed for sequence in self.waiting)
        return queued + sum(self.rows.missing(sequence.row) for sequence in self.prefilling.values())

    @property
    def idle(self) -> bool:
        """Nothing waits, runs or flies."""
        return not (self.waiting or self.running or self.flights)

    # -- planning -------------------------------------------------------------------------------------------------

    def plan(self, now: float) -> StepPlan | None:
        """The next step, or None when there is none to make before the next collect. `now` in seconds."""
        self._expire(now)
        if (self._draining or self.suspects) and self.flights:
            return None
        self._draining = False
        cohort, lines = NOBODY, NOBODY.lines
        if not self.suspects:
            if (decodes := self._plan_decodes()) is None:
                return None
            cohort, lines = decodes
        count = len(lines)
        draft = Draft(self.shape.max_tokens - count, self.shape.max_rows - count, count)
        if self.prefilling or self.waiting or self.suspects:
            self._plan_chunks(draft)
        if count + len(draft.chunks) == 0:
            return None
        return self._launch(cohort, lines, draft)

    def _plan_decodes(self) -> tuple[Cohort, np.ndarray] | None:
        """The rows that decode, and what the plan says of them; None to wait for what is in flight."""
        while True:
            cohort = self.rows.cohort()
            full = cohort.full()
            if len(full) <= self.pool.available:
                break
            if self.flights:
                self._draining = True
                return None
            self._preempt(next(s for s in reversed(self.running.values()) if not s.rests))
        lines = self.rows.decode(cohort)
        if len(full):
            blocks = np.array(self.pool.take(len(full)), np.int32)
            self.rows.grow(cohort, full, blocks)
            lines[full, BLOCK] = blocks
        return cohort, lines

    def _plan_chunks(self, draft: Draft) -> None:
        """Spend what the decodes left on prompts: seated ones first, then waiting ones while they fit."""
        for sequence in list(self.prefilling.values()):
            self._chunk(sequence, draft)
        while draft.tokens_left > 0 and draft.points_left > 0 and self.rows.free:
            newcomer = self._seat_next()
            if newcomer is None:
                break
            if newcomer.state is State.RESTING:
                continue
            table = self.rows.table[newcomer.row, : self.rows.num_blocks[newcomer.row]].copy()
            self._loads[newcomer.row] = Load(newcomer.row, newcomer.tokens, table, newcomer.draw)
            self._chunk(newcomer, draft)

    def _seat_next(self) -> Sequence | None:
        """Seat the first that waits, or the first with blocks if the pool has none for it; a suspect alone."""
        candidates: tuple[Sequence | None, ...] = (self.waiting.first, self.waiting.arrived)
        if self.suspects:
            candidates = (self.suspects[0],) if self.suspects[0].state is State.WAITING else ()
        return next((s for s in candidates if s is not None and self._seat(s)), None)

    def _seat(self, sequence: Sequence) -> bool:
        """Seat a waiting sequence with blocks for all it knows, shared ones first; False if the pool cannot."""
        size, blocks, computed = self.shape.block_size, sequence.blocks, sequence.computed
        if not blocks and self.ahead is not None and sequence.serial > self.ahead:
            return False
        if not blocks and self.shape.prefix_cache and not sequence.scores:
            sequence.chain = prefix.extend(sequence.parent, sequence.chain, sequence.tokens, size)
            blocks = self.pool.share(sequence.chain[: (len(sequence.tokens) - 1) // size])
            computed = len(blocks) * size
        missing = self.blocks_for(sequence) - len(blocks)
        if missing > self.pool.available:
            if not sequence.blocks:
                self.pool.drop(blocks)
            return False
        self.waiting.remove(sequence)
        if not sequence.admitted:
            sequence.admitted = True
            sequence.cached = 0 if sequence.blocks else min(computed, sequence.prompt_length)
            self.prompt_tokens += sequence.prompt_length
            self.cached_tokens += sequence.cached
            self.events.append(Started(sequence))
        sequence.blocks, sequence.computed = [], 0
        self.say_computed(sequence, computed)
        if sequence.rests and computed == len(sequence.tokens) - 1:
            self.rest(sequence, blocks)
            return True
        self.rows.seat(sequence, blocks + self.pool.take(missing), computed)
        self.running[sequence.serial] = self.prefilling[sequence.serial] = sequence
        return True

    def _chunk(self, sequence: Sequence, draft: Draft) -> None:
        """Plan the next chunk of a prefilling sequence, if the draft has tokens and points for one."""
        table, row = self.rows, sequence.row
        start, length = int(table.computed[row]), table.known(row) - sequence.rests
        count = min(length - start, draft.tokens_left)
        if sequence.scores:
            count = min(count, max(sequence.scored - start, 0) + draft.points_left)
            if length > sequence.prompt_length:  # points are the last tokens of a chunk: end where the scores end
                count = min(count, sequence.prompt_length - 1 - start)
        last, draws = start + count == length, start + count == length and not sequence.rests
        if count <= 0 or sequence.held or (draws and draft.points_left <= 0):
            return
        score = max(start + count - max(start, sequence.scored) - draws, 0) if sequence.scores else 0
        table.computed[row] += count
        if last:
            del self.prefilling[sequence.serial]
        if draws:
            table.open(row)
        draft.chunks.append(Chunk(sequence, start, count, score, int(draws), draft.num_points))
        draft.tokens_left -= count
        draft.points_left -= score + draws
        draft.num_points += score + draws

    def _launch(self, cohort: Cohort, lines: np.ndarray, draft: Draft) -> StepPlan:
        """Write the plan down and remember it as in flight."""
        count, chunks = len(lines), draft.chunks
        rows, serials = cohort.rows, cohort.serials
        points: Picked = slice(0, count)
        num_tokens, one_token, plain = count, True, cohort.plain
        if chunks:
            lines = np.concatenate([lines, np.array([chunk.line for chunk in chunks], np.int32)])
            num_tokens = self.shape.max_tokens - draft.tokens_left
            one_token = all((chunk.size, chunk.score, chunk.draw) == (1, 0, 1) for chunk in chunks)
            plain &= all(chunk.score == 0 and chunk.sequence.draw.plain for chunk in chunks)
            if drawing := [chunk for chunk in chunks if chunk.draw]:
                rows = np.append(cohort.numbers, [chunk.sequence.row for chunk in drawing])
                serials = np.append(serials, [chunk.sequence.serial for chunk in drawing])
                points = np.append(np.arange(count), [chunk.first_point + chunk.score for chunk in drawing])
        loads, self._loads = tuple(self._loads.values()), {}
        plan = StepPlan(self._step, lines, loads, num_tokens, draft.num_points, one_token, plain)
        self.flights.append(Flight(plan, self.rows.era, rows, serials, points, chunks))
        self._step += 1
        return plan

    # -- settling -------------------------------------------------------------------------------------------------

    def collect(self, result: StepResult) -> None:
        """Take in the result of the oldest step in flight; what it means stands in `events` afterwards."""
        flight = self.flights.popleft()
        assert flight.plan.step == result.step, f"step {flight.plan.step} flies, {result.step} was collected"
        settle(self, flight, result)
        while self.limbo and self.limbo[0][0] <= result.step:
            self.pool.drop(self.limbo.popleft()[1])

    def wake(self, leader: Sequence) -> None:
        """Let the followers of `leader` wait for a row: its prompt is published, or it is over."""
        for sequence in reversed(leader.followers):
            if sequence.state is State.FOLLOWING:
                sequence.state = State.WAITING
                self.waiting.insert(sequence)
        leader.followers = []

    def publish(self, sequence: Sequence, blocks: list[int], settled: int) -> None:
        """Let others find the full blocks of `sequence` whose KV is settled."""
        size = self.shape.block_size
        if not self.shape.prefix_cache or settled < size:
            return
        tokens = self.rows.history[sequence.row, :settled] if sequence.row >= 0 else sequence.tokens[:settled]
        sequence.chain = prefix.extend(sequence.parent, sequence.chain, tokens, size)
        for block, content in zip(blocks, sequence.chain[: settled // size], strict=False):
            self.pool.publish(block, content)

    def _release(self, sequence: Sequence, publish: bool = True) -> None:
        blocks, settled = self.rows.leave(sequence)
        self.running.pop(sequence.serial)
        self.prefilling.pop(sequence.serial, None)
        if publish:
            self.publish(sequence, blocks, settled)
        if self.flights:
            self.limbo.append((self.flights[-1].plan.step, blocks))
        else:
            self.pool.drop(blocks)

    def say_computed(self, sequence: Sequence, positions: int) -> None:
        """Tell of a sequence that only prefills how far it is."""
        if sequence.rests:
            self.events.append(Computed(sequence, positions))

    def _preempt(self, sequence: Sequence) -> None:
        assert not self.flights, "a sequence is preempted only when all it drew is known"
        self._release(sequence)
        sequence.state = State.WAITING
        sequence.preemptions += 1
        self.preemptions += 1
        self.waiting.insert(sequence)
        self.say_computed(sequence, 0)

    def rest(self, sequence: Sequence, blocks: list[int]) -> None:
        """The prompt of one that only prefills is in `blocks`: it keeps them, and is no suspect any more."""
        sequence.blocks, sequence.state = blocks, State.RESTING
        if self.suspects and self.suspects[0] is sequence:
            self.suspects.popleft()

    def pass_trial(self, sequence: Sequence) -> None:
        """A suspect's lone step went well: it waits with the others again."""
        self.suspects.popleft()
        if sequence.state is State.RUNNING:
            self._preempt(sequence)

    def _end(
        self, sequence: Sequence, reason: str, stop: int | None = None, error: SeracError | None = None
    ) -> None:
        if sequence.state is State.RUNNING:
            self._release(sequence, publish=reason != "error")
        elif sequence.state is State.WAITING:
            self.waiting.remove(sequence)
        self.pool.drop(sequence.blocks)
        sequence.blocks = []
        if sequence in self.suspects:
            self.suspects.remove(sequence)
        sequence.state = State.ENDED
        del self.live[sequence.serial]
        self.wake(sequence)
        self.events.append(Ended(sequence, reason, stop, error))

    end = _end

    def _expire(self, now: float) -> None:
        while self._deadlines and self._deadlines[0][0] <= now:
            sequence = self.live.get(heapq.heappop(self._deadlines)[1])
            if sequence is not None:
                self._end(
                    sequence, "deadline", error=DeadlineExceeded("deadline: passed before the request was done")
                )

    # -- failure --------------------------------------------------------------------------------------------------

    def fail(self, step: int | None, message: str) -> None:
        """The device's pool is gone: everyone waits again, the sequences of the step to blame as suspects."""
        serials = []
        for flight in (flight for flight in self.flights if flight.plan.step == step):
            serials = flight.serials.tolist() + [chunk.sequence.serial for chunk in flight.chunks]
        culprits = [s for serial in dict.fromkeys(serials) if (s := self.live.get(serial)) is not None]
        trial = bool(self.suspects)
        self.flights.clear()
        self.limbo.clear()
        self._loads.clear()
        for sequence in reversed(list(self.running.values())):
            self._release(sequence, publish=False)
            sequence.state = State.WAITING
            self.waiting.insert(sequence)
        self.waiting.strip()
        self.pool = BlockPool(self.shape.num_blocks)
        self.reserved = Reservations(self.pool)
        for sequence in reversed(self.live.values()):
            if sequence.state is State.RESTING:  # seated before any that runs or waits, and first again
                sequence.state, sequence.blocks = State.WAITING, []
                self.waiting.insert(sequence)
            self.say_computed(sequence, 0)
        if trial:
            for sequence in culprits:
                self._end(sequence, "error", error=DeviceError(message))
        else:
            self.suspects.extend(culprits)

    def check(self) -> None:
        """Assert that rows, blocks, queues and states agree. O(everything); for tests and idle moments."""
        self.rows.check(len(self.flights))
        holds = [block for _, blocks in self.limbo for block in blocks] + self.reserved.blocks
        holds += [block for sequence in self.live.values() for block in sequence.blocks]
        for sequence in self.running.values():
            holds += self.rows.blocks(sequence.row)
        self.pool.check(holds)
        seated = {s.serial for s in self.rows.occupant if s is not None}
        assert seated == set(self.running) and set(self.prefilling) <= seated
        states = {s.serial: s.state for s in self.live.values()}
        assert State.ENDED not in states.values()
        assert {s.serial for s in self.waiting} == {k for k, state in states.items() if state is State.WAITING}
        assert set(self.running) == {k for k, state in states.items() if state is State.RUNNING}
