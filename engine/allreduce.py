"""What only a process with JAX can say of a host: the model there, its devices, and how fast hosts add up arrays.

    python -m engine.allreduce, on each host at once; a JSON line in, JSON lines out
    in   {"model", "coordinator", "bind", "rank", "processes", "devices", "sizes"}
    out  {"event": "seen", "revision", "model_bytes", "model_problem"}
         rank 0: {"event": "row", "bytes", "us", "GB/s"} for each size, {"event": "done"}; others: done

GB/s is the bytes of one device's array over the time. Every sum is held against the one that it must be. The
coordinator listens on `bind` alone. Costs the import of JAX and about two seconds of sums.
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import IO

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from engine.errors import SeracError
from engine.weights.source import resolve

SIZES = (8 * 2**10, 64 * 2**10, 512 * 2**10, 4 * 2**20, 32 * 2**20, 64 * 2**20)
START_S, HEARTBEAT_S = 20, 10
WARM = 2
MOST_BYTES, MOST_REPEATS, LEAST_REPEATS = 256 * 2**20, 30, 3


def main(source: IO[str], out: IO[str]) -> None:
    """Join, look, measure."""
    words = json.loads(source.readline())
    say(out, {"event": "seen", **model(words["model"])})
    if words["processes"] > 1:
        join(words)
    for row in sweep(words.get("sizes") or SIZES):
        if words["rank"] == 0:
            say(out, {"event": "row", **row})
    say(out, {"event": "done"})


def say(out: IO[str], words: Mapping[str, object]) -> None:
    print(json.dumps(words), file=out, flush=True)


def join(words: Mapping[str, object]) -> None:
    """Become one of several processes; CPUs talk through gloo."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        coordinator_address=words["coordinator"],
        coordinator_bind_address=words["bind"],
        num_processes=words["processes"],
        process_id=words["rank"],
        local_device_ids=words["devices"] or None,
        initialization_timeout=START_S,
        heartbeat_timeout_seconds=HEARTBEAT_S,
        shutdown_timeout_seconds=HEARTBEAT_S,
    )


def model(name: str) -> dict[str, object]:
    """Its revision and size here, or why it cannot be served; no weight is read."""
    try:
        folder = resolve(name)
    except SeracError as error:
        return {"revision": "", "model_bytes": 0, "model_problem": str(error)}
    size = sum(path.stat().st_size for path in folder.path.rglob("*") if path.is_file())
    return {"revision": folder.revision, "model_bytes": size, "model_problem": ""}


def sweep(sizes: Sequence[int]) -> Iterator[dict[str, object]]:
    """A row for each size, in bytes of one device's array. Raises ArithmeticError for a wrong sum."""
    devices = np.array(jax.devices())
    mesh = Mesh(devices, ("device",))
    spec = PartitionSpec("device")
    add = jax.jit(
        jax.shard_map(lambda x: jax.lax.psum(x, "device"), mesh=mesh, in_specs=spec, out_specs=PartitionSpec())
    )
    for size in sizes:
        shape = (len(devices), size // 4)
        x = jax.make_array_from_callback(
            shape, NamedSharding(mesh, spec), lambda index, shape=shape: part(index, shape)
        )
        took = timed(lambda x=x: add(x), repeats(size))
        found = np.asarray(add(x).addressable_shards[0].data)
        if not (found == len(devices) * (len(devices) + 1) / 2).all():
            raise ArithmeticError(f"a sum of {size} bytes over {len(devices)} devices is wrong")
        yield {"bytes": size, "us": 1e6 * took, "GB/s": size / took / 1e9}


def part(index: tuple[slice, ...], shape: tuple[int, int]) -> np.ndarray:
    """Device d holds d + 1 everywhere."""
    return np.full((1, shape[1]), (index[0].start or 0) + 1, np.float32)


def repeats(size: int) -> int:
    """The same on every process, which must call as often."""
    return max(LEAST_REPEATS, min(MOST_REPEATS, MOST_BYTES // size))


def timed(call: Callable[[], jax.Array], times: int) -> float:
    """Median seconds."""
    took = []
    for _ in range(WARM + times):
        began = time.perf_counter()
        jax.block_until_ready(call())
        took.append(time.perf_counter() - began)
    return statistics.median(took[WARM:])


def leave(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print as usual and end at once: at exit JAX would wait for processes that wait for this one."""
    sys.__excepthook__(kind, error, trace)
    sys.stderr.flush()
    os._exit(1)


if __name__ == "__main__":
    sys.excepthook = leave
    main(sys.stdin, sys.stdout)
