"""What the result of a step means: prompts move on and are published, tokens are known, sequences end.

Only rows whose occupant is still the one that was planned count; the others are zombies, their draws are dropped.
Costs a dozen numpy calls a step, and Python per chunk of a prompt and per sequence that ends.
"""

from typing import TYPE_CHECKING

import numpy as np

from engine.core.events import Emission, Scored
from engine.core.plan import COUNT, DRAW, ROW, SCORE, START, StepResult
from engine.core.sequence import Sequence
from engine.errors import NumericError

if TYPE_CHECKING:
    from engine.core.scheduler import Flight, Scheduler

Picked = np.ndarray | slice


def settle(scheduler: "Scheduler", flight: "Flight", result: StepResult) -> None:
    """Take `result` of `flight` into `scheduler`."""
    _settle_chunks(scheduler, flight, result)
    rows = flight.plan.rows
    picked: Picked = slice(None)
    points: Picked = slice(None)
    if not flight.plan.one_token:
        picked = np.flatnonzero(rows[:, DRAW])
        points = (np.cumsum(rows[:, SCORE] + rows[:, DRAW]) - 1)[picked]
    seats, serials = rows[picked, ROW].astype(np.int64), flight.serials[picked]
    alive = scheduler.rows.serial[seats] == serials
    if not alive.all():
        points = np.arange(len(result.tokens))[points][alive]
        seats, serials = seats[alive], serials[alive]
    if len(seats):
        _settle_draws(scheduler, result, seats, serials, points)


def _settle_chunks(scheduler: "Scheduler", flight: "Flight", result: StepResult) -> None:
    table = scheduler.rows
    rows = flight.plan.rows
    ends = np.cumsum(rows[:, SCORE] + rows[:, DRAW])
    for sequence, k, settled in flight.chunks:
        row = sequence.row
        if row < 0 or table.serial[row] != flight.serials[k]:
            continue
        table.settled[row] = settled
        if rows[k, SCORE]:
            first = int(ends[k] - rows[k, DRAW] - rows[k, SCORE])
            if not _settle_scores(scheduler, sequence, rows[k], result, slice(first, first + int(rows[k, SCORE]))):
                continue
        blocks = table.table[row, : settled // scheduler.shape.block_size].tolist()
        scheduler.publish(sequence, blocks, settled)
        if settled >= sequence.prompt_length:
            scheduler.wake(sequence)


def _settle_scores(
    scheduler: "Scheduler", sequence: Sequence, row: np.ndarray, result: StepResult, points: slice
) -> bool:
    """Report scored prompt tokens; False when their logits were not finite and the sequence ended."""
    if not result.finite[points].all():
        _end_numeric(scheduler, sequence, int(row[START]))
        return False
    assert result.logprob is not None and result.rank is not None
    assert result.top_ids is not None and result.top_logprobs is not None
    last = int(row[START] + row[COUNT]) - int(row[DRAW])
    first = last - int(row[SCORE]) + 1
    scheduler.events.append(
        Scored(
            sequence,
            first,
            result.logprob[points],
            result.rank[points],
            result.top_ids[points],
            result.top_logprobs[points],
        )
    )
    sequence.scored = last
    return True


def _settle_draws(
    scheduler: "Scheduler", result: StepResult, seats: np.ndarray, serials: np.ndarray, points: Picked
) -> None:
    table = scheduler.rows
    tokens, finite = result.tokens[points], result.finite[points]
    if not finite.all():
        for row in seats[~finite].tolist():
            if (sequence := table.occupant[row]) is not None:
                _end_numeric(scheduler, sequence, int(table.known[row]))
        seats, serials, tokens = seats[finite], serials[finite], tokens[finite]
        points = np.arange(len(result.tokens))[points][finite]
    ends = table.receive(seats, tokens)
    scheduler.events.append(_emission(result, serials, tokens, points))
    for row, token in zip(seats[ends].tolist(), tokens[ends].tolist(), strict=True):
        if (sequence := table.occupant[row]) is not None:
            if token in sequence.stop_ids:
                scheduler.end(sequence, "stop", stop=token)
            else:
                scheduler.end(sequence, "length")
    if scheduler.suspects:
        for row in seats[~ends].tolist():
            if (sequence := table.occupant[row]) is not None:
                scheduler.pass_trial(sequence)


def _emission(result: StepResult, serials: np.ndarray, tokens: np.ndarray, points: Picked) -> Emission:
    if result.logprob is None:
        return Emission(serials, tokens)
    assert result.rank is not None and result.top_ids is not None and result.top_logprobs is not None
    return Emission(
        serials,
        tokens,
        result.logprob[points],
        result.rank[points],
        result.top_ids[points],
        result.top_logprobs[points],
    )


def _end_numeric(scheduler: "Scheduler", sequence: Sequence, position: int) -> None:
    """End a sequence whose logits were not finite; the blocks it published are in doubt and forgotten."""
    scheduler.pool.forget(scheduler.rows.table[sequence.row, : scheduler.rows.num_blocks[sequence.row]].tolist())
    error = NumericError(f"numeric: non-finite logits at position {position}")
    scheduler.end(sequence, "error", error=error)
