"""What the result of a step means: prompts move on and are published, tokens are known, sequences end.

Only rows whose occupant is still the one that was planned count; the others are zombies, their draws are dropped.
Costs a dozen numpy calls a step, and Python per chunk of a prompt and per sequence that ends.
"""

from typing import TYPE_CHECKING

import numpy as np

from engine.core.events import Emission, Scored
from engine.core.plan import StepResult
from engine.core.rows import Picked
from engine.core.sequence import Sequence
from engine.errors import NumericError

if TYPE_CHECKING:
    from engine.core.scheduler import Chunk, Flight, Scheduler


def settle(scheduler: "Scheduler", flight: "Flight", result: StepResult) -> None:
    """Take `result` of `flight` into `scheduler`."""
    for chunk in flight.chunks:
        _settle_chunk(scheduler, chunk, result)
    table, rows, serials, points = scheduler.rows, flight.rows, flight.serials, flight.points
    if flight.era != table.era:
        alive = table.serial[rows] == serials
        if not alive.all():
            rows, serials = table.numbers[rows][alive], serials[alive]
            points = np.arange(len(result.tokens))[points][alive]
    if len(serials):
        _settle_draws(scheduler, result, rows, serials, points)


def _settle_chunk(scheduler: "Scheduler", chunk: "Chunk", result: StepResult) -> None:
    sequence, row = chunk.sequence, chunk.sequence.row
    if row < 0:
        return
    scheduler.rows.settled[row] = chunk.end
    if chunk.score and not _settle_scores(scheduler, chunk, result):
        return
    blocks = scheduler.rows.table[row, : chunk.end // scheduler.shape.block_size].tolist()
    scheduler.publish(sequence, blocks, chunk.end)
    if chunk.end >= sequence.prompt_length:
        scheduler.wake(sequence)
    if sequence.rests:
        _settle_prompt(scheduler, sequence, chunk.end)


def _settle_prompt(scheduler: "Scheduler", sequence: Sequence, computed: int) -> None:
    """A sequence that only prefills has got so far; at the end it leaves its row and keeps its blocks."""
    scheduler.say_computed(sequence, computed)
    if computed == len(sequence.tokens) - 1:
        blocks, _ = scheduler.rows.leave(sequence)
        scheduler.running.pop(sequence.serial)
        scheduler.rest(sequence, blocks)


def _settle_scores(scheduler: "Scheduler", chunk: "Chunk", result: StepResult) -> bool:
    """Report scored prompt tokens; False when their logits were not finite and the sequence ended."""
    sequence, points = chunk.sequence, slice(chunk.first_point, chunk.first_point + chunk.score)
    if not result.finite[points].all():
        _end_numeric(scheduler, sequence, chunk.start)
        return False
    assert result.logprob is not None and result.rank is not None
    assert result.top_ids is not None and result.top_logprobs is not None
    last = chunk.end - chunk.draw
    first = last - chunk.score + 1
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
    scheduler: "Scheduler", result: StepResult, rows: Picked, serials: np.ndarray, points: Picked
) -> None:
    table = scheduler.rows
    tokens, finite = result.tokens[points], result.finite[points]
    if not finite.all():
        for row in table.numbers[rows][~finite].tolist():
            if (sequence := table.occupant[row]) is not None:
                _end_numeric(scheduler, sequence, table.known(row))
        rows, serials, tokens = table.numbers[rows][finite], serials[finite], tokens[finite]
        points = np.arange(len(result.tokens))[points][finite]
    ends = table.receive(rows, tokens)
    scheduler.events.append(_emission(result, serials, tokens, table.newest(rows), points))
    if ends.any():
        _end_drawn(scheduler, table.numbers[rows][ends].tolist(), tokens[ends].tolist())
    if scheduler.suspects:
        for row in table.numbers[rows][~ends].tolist():
            if (sequence := table.occupant[row]) is not None:
                scheduler.pass_trial(sequence)


def _end_drawn(scheduler: "Scheduler", rows: list[int], tokens: list[int]) -> None:
    """End the sequences in `rows`, each with its last token."""
    for row, token in zip(rows, tokens, strict=True):
        if (sequence := scheduler.rows.occupant[row]) is not None:
            if token in sequence.stop_ids:
                scheduler.end(sequence, "stop", stop=token)
            else:
                scheduler.end(sequence, "length")


def _emission(
    result: StepResult, serials: np.ndarray, tokens: np.ndarray, positions: np.ndarray, points: Picked
) -> Emission:
    if result.logprob is None:
        return Emission(serials, tokens, positions)
    assert result.rank is not None and result.top_ids is not None and result.top_logprobs is not None
    return Emission(
        serials,
        tokens,
        positions,
        result.logprob[points],
        result.rank[points],
        result.top_ids[points],
        result.top_logprobs[points],
    )


def _end_numeric(scheduler: "Scheduler", sequence: Sequence, position: int) -> None:
    """End a sequence whose logits were not finite; the blocks it published are in doubt and forgotten."""
    scheduler.pool.forget(scheduler.rows.blocks(sequence.row))
    error = NumericError(f"numeric: non-finite logits at position {position}")
    scheduler.end(sequence, "error", error=error)
