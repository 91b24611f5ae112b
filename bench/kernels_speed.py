"""How fast one implementation serves one family of cases on this device.

    case -> pool in copies, shuffled table -> two programs (kernels_time) -> a row for each context

Copies of the pool follow one another from call to call, so that the keys of a call are not in the cache when it
begins. What does not fit the device's memory is skipped by name.
The XLA path is timed where it is not hopeless. Cost: two compilations a family, a second a context.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bench.kernels_cases import Case, Decode, Prefill, cases, small_cases
from bench.kernels_process import Row
from bench.kernels_scenes import timed_pools, timed_table
from bench.kernels_serve import attend_of, call_of, tuned_config
from bench.kernels_time import chains, slope, this_target
from pallas_kernels.rows import Rows
from pallas_kernels.shape import Shape

COLD_BYTES = 1 << 29  # a call's keys come again after so many bytes: ten times the largest cache
MEMORY_SHARE = 0.8
XLA_BYTES, XLA_FLOPS = 300 << 20, 3e11  # of a call, beyond which it is not asked to


class Plan(NamedTuple):
    """How a family is laid out in memory."""

    blocks: int  # of one copy
    copies: int
    columns: int
    counts: tuple[int, int]


def case_of(name: str, small: bool) -> Case:
    """The case of that name, as `label` gives it."""
    return {label(case): case for case in (small_cases() if small else cases())}[name]


def label(case: Case) -> str:
    """A name of its own for each case."""
    if isinstance(case, Decode):
        return f"decode {case.name}"
    return f"prefill {case.name} {case.tokens}" + (f" after {case.prefix}" if case.prefix else "")


def shape_of(case: Case) -> Shape:
    """What the dispatcher would see."""
    heads = case.heads
    return Shape(heads.N // heads.K, heads.H, case.block, case.dtype, case.pool)


def plan(case: Case, memory_bytes: int) -> Plan:
    """For a case that fits."""
    decode = isinstance(case, Decode)
    largest = copy_bytes(case, max(case.contexts) if decode else case.longest)
    if not decode:
        counts, wanted = (1, 5), 1
    else:
        counts = (1, 33) if case.batch == 1 else (1, 17) if case.batch < 64 else (1, 5)
        wanted = math.ceil(COLD_BYTES / copy_bytes(case, min(case.contexts)))
    copies = max(1, min(wanted, counts[1], int(MEMORY_SHARE * memory_bytes // largest)))
    blocks = largest // (case.block * case.position_bytes)
    return Plan(blocks, copies, -(-case.longest // case.block), counts)


def measure(case: Case, by: str, memory_bytes: int, config: tuple | None = None) -> Iterator[Row]:
    """Rows of figures, one for each context; a `config` of None leaves it to the kernel's rule."""
    case, too_large = fitting(case, memory_bytes)
    for context, words in too_large.items():
        yield {"context": context, "skipped": words}
    wanted = contexts(case, by)
    if not wanted:
        return
    laid = plan(case, memory_bytes)
    if by == "xla":
        laid = laid._replace(counts=(1, 3))
    heads = case.heads
    call = call_of(case.part, attend_of(case.part, by, this_target(), config), heads.H**-0.5)
    k, v = timed_pools(laid.blocks * laid.copies, heads.K, case.block, heads.H, case.pool)
    q_TNH = jax.random.normal(jax.random.key(2), (tokens_of(case), heads.N, heads.H), case.dtype)
    run: Callable | None = None
    for context in wanted:
        rows = jax.tree.map(jnp.asarray, rows_of(case, context, laid.columns))
        arrays = (q_TNH, k, v, rows)
        run = run or chains(call, laid.counts, laid.blocks, laid.copies, arrays)
        took = slope(functools.partial(_given, run, arrays), laid.counts)
        yield {"context": context, **figures(case, context, took), "copies": laid.copies}


def fitting(case: Case, memory_bytes: int) -> tuple[Case, dict[int, str]]:
    """The case with the contexts that fit, and why the others do not. Raises MemoryError if none does."""
    every = case.contexts if isinstance(case, Decode) else (case.longest,)
    held = {context: copy_bytes(case, context) for context in every}
    most = MEMORY_SHARE * memory_bytes
    large = {
        context: f"{held_bytes / 1e9:.1f} GB of keys and values do not fit {memory_bytes / 1e9:.1f} GB of memory"
        for context, held_bytes in held.items()
        if held_bytes > most
    }
    kept = tuple(context for context in every if context not in large)
    if not kept:
        raise MemoryError("; ".join(large.values()))
    return (case._replace(contexts=kept) if isinstance(case, Decode) else case), large


def copy_bytes(case: Case, context: int) -> int:
    """Of the blocks that one call reads."""
    lengths = case.lengths(context) if isinstance(case, Decode) else [context]
    return sum(-(-length // case.block) for length in lengths) * case.block * case.position_bytes


def tokens_of(case: Case) -> int:
    """Of a step."""
    return case.batch if isinstance(case, Decode) else case.tokens


def _given(run: Callable, arrays: tuple, count: int) -> None:
    run(count, *arrays)


def tuned_for(case: Case, by: str) -> tuple | None:
    """The config that the dispatcher would hand to `by`."""
    return tuned_config(case.part, by, this_target(), shape_of(case), tokens_of(case))


def contexts(case: Case, by: str) -> list[int]:
    """Those that are not hopeless."""
    every = list(case.contexts) if isinstance(case, Decode) else [case.longest]
    if by != "xla":
        return every
    if isinstance(case, Prefill):
        return every if case.flops <= XLA_FLOPS else []
    return [context for context in every if moved_bytes(case, context) <= XLA_BYTES]


def rows_of(case: Case, context: int, columns: int) -> Rows:
    """On the host."""
    rng = np.random.default_rng(context)
    if isinstance(case, Prefill):
        one = [np.array([number], np.int32) for number in (0, case.prefix, case.tokens)]
        return Rows(*one, timed_table(rng, [case.longest], case.block, columns))
    lengths = np.array(case.lengths(context), np.int32)
    first_B, count_B = np.arange(case.batch, dtype=np.int32), np.ones(case.batch, np.int32)
    return Rows(first_B, lengths - 1, count_B, timed_table(rng, lengths, case.block, columns))


def moved_bytes(case: Case, context: int) -> int:
    """Keys and values that a call cannot but read."""
    positions = case.longest if isinstance(case, Prefill) else sum(case.lengths(context))
    return positions * case.position_bytes


def figures(case: Case, context: int, took: float) -> Row:
    """Of one call of so many seconds."""
    moved = moved_bytes(case, context)
    found = {"us": 1e6 * took, "bytes": moved, "GB/s": moved / took / 1e9}
    if isinstance(case, Prefill):
        found |= {"flops": case.flops, "TFLOP/s": case.flops / took / 1e12}
    return found
