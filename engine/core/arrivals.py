"""Prompts that one lane computes and another decodes, as a scheduler sees them at both ends.

    prefill     a sequence that computes the KV of all but its last token, then rests with it
    give_up     its blocks are taken for others, and it waits again
    adopt       a sequence whose KV was computed elsewhere and has come into blocks that are now its own

Costs what the scheduler's own `submit` does, and one hash a block.
"""

from collections.abc import Sequence as PySequence

import numpy as np

from engine.core import prefix
from engine.core.blocks import Content
from engine.core.request import Request
from engine.core.scheduler import Scheduler
from engine.core.sequence import Part, Sequence, State


def prefill(scheduler: Scheduler, request: Request, serial: int) -> Sequence:
    """Queue a sequence that computes the KV of all but the last token of its prompt, then rests with it."""
    (sequence,) = scheduler.submit(request, 0, (Part(serial),))
    sequence.rests = True
    return sequence


def give_up(scheduler: Scheduler, sequence: Sequence) -> None:
    """Take a resting prompt's blocks for others. It waits in its turn, and finds what is still cached."""
    scheduler.pool.drop(sequence.blocks)
    sequence.blocks, sequence.state = [], State.WAITING
    scheduler.waiting.put_back(sequence)
    scheduler.say_computed(sequence, 0)


def chain(scheduler: Scheduler, request: Request, tokens: PySequence[int]) -> list[Content]:
    """What the full blocks before the last of `tokens` hold, for a request's adapter and salt."""
    parent = prefix.start(scheduler.root, request.adapter, request.salt)
    return prefix.extend(parent, (), np.array(tokens[:-1], np.int32), scheduler.shape.block_size)


def room(scheduler: Scheduler, count: int, number: int) -> bool:
    """Whether handoff `number` can get `count` blocks without taking them from who waits longer for blocks here."""
    hungry = scheduler.waiting.hungry
    wanted = 0 if hungry is None or hungry.serial > number else scheduler.blocks_for(hungry)
    return count + wanted <= scheduler.pool.available


def adopt(
    scheduler: Scheduler, request: Request, seed: int, parts: PySequence[Part], blocks: list[int], computed: int
) -> list[Sequence]:
    """`submit`, with the KV of the leader's first `computed` positions already in `blocks`, now its own."""
    group = scheduler.submit(request, seed, parts)
    leader = group[0]
    leader.blocks, leader.computed = blocks, computed
    scheduler.waiting.arrive(leader)
    scheduler.publish(leader, blocks, computed)
    return group
