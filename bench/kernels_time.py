"""How long a call takes on a device, and how fast the device is at its best.

    program(few)    call -> call                         the time of one call is the slope between the two:
    program(many)   call -> call -> call -> ... -> call  (t(many) - t(few)) / (many - few)

The calls of a program wait for each other: each adds to the next one's `base` whether its output holds NaN, which
is 0 and which the compiler cannot know; that link costs one small kernel a call and is timed as a ceiling too. Each
call gets another base, so that it finds its keys in memory and not in the cache. What does not depend on base, as
a list of work, is computed once a program: so it is in a step, where all layers share it.
Starting a program, waiting for it and whatever else is the same for both cancels. Medians of several slopes.
"""

import functools
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from statistics import median

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from bench.kernels_process import Row
from pallas_kernels.target import Target, target_of

Clock = Callable[[], float]
LEAST, MOST = 5, 25  # slopes
SPENT_S = 0.4
LINE = 4096


class NoiseError(ArithmeticError):
    """Nothing can be told from these times."""


def device_facts() -> Row:
    """What decides which cases run; memory that JAX may use."""
    device = jax.devices()[0]
    target = target_of(device)
    stats = device.memory_stats() or {}
    return {**target._asdict(), "memory_bytes": stats.get("bytes_limit"), "jax": jax.__version__}


def this_target() -> Target:
    """Of the device that jax takes first."""
    return target_of(jax.devices()[0])


def chain(call: Callable[..., tuple[jax.Array, jax.Array]], count: int) -> Callable:
    """A program of `count` calls, each after the one before: (base of each, arrays) -> the last one's outputs."""
    once = jax.jit(call)

    def calls(base_R: jax.Array, *arrays) -> tuple[jax.Array, jax.Array]:
        link = jnp.int32(0)
        for index in range(count):
            out = lax.optimization_barrier(once(base_R[index] + link, *arrays))  # all of each
            link = sum(jnp.isnan(part.reshape(-1)[0]).astype(jnp.int32) for part in out)
        return out

    return jax.jit(calls)


def chains(call: Callable, counts: tuple[int, int], step: int, copies: int, arrays: tuple) -> Callable[[int], None]:
    """Compiles both programs; returns a function that runs the one of so many calls and waits for it.

    Call i has base (i modulo copies) * step.
    """
    bases = {count: jnp.asarray(np.arange(count) % copies * step, jnp.int32) for count in counts}
    lowered = [chain(call, count).lower(base_R, *arrays) for count, base_R in bases.items()]
    with ThreadPoolExecutor(len(counts)) as pool:
        compiled = dict(zip(counts, pool.map(lambda one: one.compile(), lowered), strict=True))

    def run(count: int, *others) -> None:
        jax.block_until_ready(compiled[count](bases[count], *(others or arrays)))

    return run


def slope(run: Callable[[int], None], counts: tuple[int, int], clock: Clock = time.perf_counter) -> float:
    """Seconds of one call. Raises NoiseError where the noise is larger than what many calls add to few."""
    few, many = counts
    for count in (few, many):
        run(count)
    slopes, began = [], clock()
    while len(slopes) < LEAST or len(slopes) < MOST and clock() - began < SPENT_S:
        times = []
        for count in (few, many):
            start = clock()
            run(count)
            times.append(clock() - start)
        slopes.append((times[1] - times[0]) / (many - few))
    found = median(slopes)
    if found <= 0:
        raise NoiseError(f"{many} calls take no longer than {few}: nothing to be told")
    return found


def ceiling(name: str, small: bool) -> Row:
    """The fastest that this device reads, copies, multiplies and goes from call to call."""
    if name == "link":
        x_H = jnp.ones(128, jnp.float32)
        counts = (2, 66)
        run = chains(lambda base, x_H: (x_H + base.astype(jnp.float32), x_H), counts, 0, 1, (x_H,))
        return {"us": 1e6 * slope(run, counts)}
    if name == "matmul":
        return _products(256 if small else 8192)
    return _stream(name, 1 << 22 if small else 1 << 30)


def _products(width: int) -> Row:
    keys = jax.random.split(jax.random.key(0), 2)
    x_DD, w_DD = (jax.random.normal(key, (width, width), jnp.bfloat16) for key in keys)
    w_DD *= width**-0.5  # products of products stay as large as x

    def times(count: int) -> Callable[[], jax.Array]:
        program = jax.jit(lambda x_DD, w_DD: functools.reduce(jnp.matmul, [w_DD] * count, x_DD))
        compiled = program.lower(x_DD, w_DD).compile()
        return lambda: compiled(x_DD, w_DD)

    counts = (2, 10)
    programs = {count: times(count) for count in counts}
    took = slope(lambda count: jax.block_until_ready(programs[count]()), counts)
    flops = 2 * width**3
    return {"us": 1e6 * took, "flops": flops, "TFLOP/s": flops / took / 1e12}


def _stream(name: str, size: int) -> Row:
    """Reading is the sum of each line of `size` float32 numbers; a copy reads and writes them."""
    drawn = np.random.default_rng(0).standard_normal((min(size // LINE, 1024), LINE), np.float32)
    lines = jnp.tile(drawn, (size // drawn.size, 1))

    def over(base: jax.Array, lines: jax.Array) -> tuple[jax.Array, jax.Array]:
        shifted = lines + base.astype(jnp.float32)
        found = jnp.sum(shifted, axis=1) if name == "read" else shifted
        return found, found.reshape(-1)[:1]

    counts = (1, 5)
    took = slope(chains(over, counts, 0, 1, (lines,)), counts)
    moved = lines.nbytes * (1 if name == "read" else 2)
    return {"us": 1e6 * took, "bytes": moved, "GB/s": moved / took / 1e9}
