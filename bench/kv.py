"""A move of KV blocks between two lanes of one process, beside copying as many bytes.

    memcpy | bare | copied | moved | unchecked | memcpy | ... in turns -> ratios within each turn

bare       carries gathered blocks to the other lane's devices; copied does so as if they did not share their memory
moved      gathers blocks out of a pool, carries them, computes the checksums at both ends, and scatters into the
           other pool, in pieces, a few of which are on their way
unchecked  the same without checksums

A ratio is the time of the memcpy, between two buffers that are warm, over that of the move: above 1 is faster.
Pools hold bfloat16, blocks are drawn at random. Virtual devices of one CPU share its memory and its cores.
"""

import argparse
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from bench.record import parser, record, show
from engine.environment import needed
from engine.errors import SeracError
from engine.movers.checksums import checksums
from engine.movers.local import Carrier, host_shards
from engine.runner.moves import MovePrograms, Staged, cut, move_sizes
from engine.runner.state import POOL
from sharding.mesh import MeshSpec, lane_meshes
from sharding.overlap import overlaps

KV_HEADS, HEAD_WIDTH, MOST_LAYERS = 8, 128, 16
DEVICES = "16"  # virtual ones, for two lanes of at most 8
SIZES = tuple(1 << power for power in (16, 20, 24, 26, 28, 30))
WINDOW = 2  # pieces on their way at a time, of each kind
RUN_S = 0.01  # what is shorter is repeated until it takes so long

Pools = tuple[jax.Array, jax.Array]
Sum = Callable[[np.ndarray, np.ndarray], np.ndarray]


class Pair:
    """Two lanes with pools that hold `size` bytes in blocks, and the way between them."""

    def __init__(self, tps: tuple[int, int], size: int, block_size: int):
        layer_bytes = 2 * KV_HEADS * block_size * HEAD_WIDTH * 2
        layers = min(max(size // layer_bytes, 1), MOST_LAYERS)
        count = max(size // (layers * layer_bytes), 1)
        self.num_bytes = count * layers * layer_bytes
        devices = jax.devices()
        meshes = _mesh(tps[0], devices), _mesh(tps[1], devices[tps[0] :] + devices)
        sizes = move_sizes(layers * layer_bytes // 2 // min(tps), count, devices[0].platform)
        num_blocks = count + count // 4 + 1
        shape = (layers * num_blocks, KV_HEADS, block_size, HEAD_WIDTH)
        self.source, self.target = (MovePrograms(mesh, layers, num_blocks, sizes) for mesh in meshes)
        self.pools = [_pool(shape, mesh) for mesh in meshes]
        plan = overlaps(KV_HEADS, *((mesh.shape["kv"], 1) for mesh in meshes))
        self._carrier, self._copier = Carrier(*meshes, plan), Carrier(*meshes, plan, shared=False)
        for size in sizes:
            self.pools = [self.source.compile(size, self.pools[0]), self.target.compile(size, self.pools[1])]
        rng = np.random.default_rng(0)
        lists = [(1 + rng.permutation(num_blocks - 1)[:count]).tolist() for _ in range(2)]
        self.pieces = list(zip(*(list(cut(blocks, sizes)) for blocks in lists), strict=True))
        self._gathered = [self.source.gather(self.pools[0], blocks) for blocks, _ in self.pieces]
        self._buffers = [np.full(self.num_bytes, fill, np.uint8) for fill in (1, 2)]

    def memcpy(self) -> None:
        """As many bytes from one buffer to another."""
        np.copyto(*self._buffers)

    def bare(self) -> None:
        """Carry what is gathered, and wait for it."""
        self._carry_all(self._carrier)

    def copied(self) -> None:
        """The same between devices that share no memory."""
        self._carry_all(self._copier)

    def _carry_all(self, carrier: Carrier) -> None:
        waiting: deque[Staged] = deque()
        for staged in self._gathered:
            waiting.append(carrier.carry(staged))
            if len(waiting) > WINDOW:
                jax.block_until_ready(waiting.popleft())
        jax.block_until_ready(list(waiting))

    def move(self, summed: Sum) -> None:
        """Move all blocks from pool to pool; `summed` is compared at both ends."""
        gathered: deque[tuple[Staged, Sequence[int], int]] = deque()
        carried: deque[tuple[Staged, Sequence[int], np.ndarray]] = deque()
        for from_blocks, to_blocks in self.pieces:
            gathered.append((self.source.gather(self.pools[0], from_blocks), to_blocks, len(from_blocks)))
            self._send(gathered, carried, summed, WINDOW)
            self._land(carried, summed, WINDOW)
        self._send(gathered, carried, summed, 0)
        self._land(carried, summed, 0)
        jax.block_until_ready(self.pools[1])

    def _send(self, gathered: deque, carried: deque, summed: Sum, most: int) -> None:
        while len(gathered) > most:
            staged, blocks, count = gathered.popleft()
            sums = of_shards(summed, staged, count)
            carried.append((self._carrier.carry(staged), blocks, sums))

    def _land(self, carried: deque, summed: Sum, most: int) -> None:
        while len(carried) > most:
            moved, blocks, sums = carried.popleft()
            if not np.array_equal(of_shards(summed, moved, len(blocks)), sums):
                raise SeracError("blocks changed on their way")
            self.pools[1] = self.target.scatter(self.pools[1], blocks, moved)


def of_shards(summed: Sum, staged: Staged, count: int) -> np.ndarray:
    """`summed` of all heads; waits for the devices."""
    return np.concatenate([summed(shard.keys_KLnCH, shard.values_KLnCH) for shard in host_shards(staged, count)])


def nothing(keys_KLnCH: np.ndarray, values_KLnCH: np.ndarray) -> np.ndarray:
    """No checksum."""
    return np.empty(0, np.uint64)


def measure(pair: Pair, turns: int) -> dict[str, float]:
    """Medians over `turns`; of each kind its ratio, and what share of the move the checksums take."""
    kinds: dict[str, Callable[[], None]] = {
        "memcpy": pair.memcpy,
        "bare": pair.bare,
        "copied": pair.copied,
        "moved": partial(pair.move, checksums),
        "unchecked": partial(pair.move, nothing),
    }
    repeats = {name: _repeats(run) for name, run in kinds.items()}
    rows = [{name: _seconds(run, repeats[name]) for name, run in kinds.items()} for _ in range(turns)]
    figures = {"memcpy GB/s": pair.num_bytes / median(row["memcpy"] for row in rows) / 1e9}
    figures["moved ms"] = median(row["moved"] for row in rows) * 1e3
    for name in list(kinds)[1:]:
        figures[name] = median(row["memcpy"] / row[name] for row in rows)
    figures["checksums' share"] = median(1 - row["unchecked"] / row["moved"] for row in rows)
    return figures


def _repeats(run: Callable[[], None]) -> int:
    run()
    return max(int(RUN_S / _seconds(run, 1)), 1)


def _seconds(run: Callable[[], None], repeats: int) -> float:
    began = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - began) / repeats


def _mesh(tp: int, devices: Sequence[jax.Device]) -> Mesh:
    return lane_meshes(MeshSpec(tp=tp), KV_HEADS, KV_HEADS, devices)[0]


def _pool(shape: tuple[int, ...], mesh: Mesh) -> Pools:
    rng = np.random.default_rng(0)
    keys, values = (rng.integers(0, 1 << 16, shape, np.uint16) for _ in range(2))
    return jax.device_put((keys, values), NamedSharding(mesh, POOL))


def options() -> argparse.ArgumentParser:
    """What can be told."""
    lines = parser("kv", __doc__)
    lines.add_argument("--pairs", default="2:2,2:4,4:2,1:8", help="tp of the lanes, source:target")
    lines.add_argument(
        "--most", type=float, default=256, metavar="MiB", help="of the sizes up to 1 GiB (default 256)"
    )
    lines.add_argument("--block-size", type=int, default=16, help="positions a block (default 16)")
    lines.add_argument("--turns", type=int, default=9)
    return lines


def main(arguments: list[str]) -> int:
    """Measure every pair of lanes at every size."""
    chosen = options().parse_args(arguments)
    if missing := needed("cpu", DEVICES, os.environ):
        command = [sys.executable, "-m", "bench", "kv", *arguments]
        return subprocess.run(command, env={**os.environ, **missing}, check=False).returncode
    rows = []
    for words in chosen.pairs.split(","):
        source, _, target = words.partition(":")
        for size in (size for size in SIZES if size <= chosen.most * (1 << 20)):
            pair = Pair((int(source), int(target)), size, chosen.block_size)
            rows.append({"tp": words, "KiB": pair.num_bytes >> 10, **measure(pair, chosen.turns)})
            print(f"{words} {size >> 10} KiB ...", file=sys.stderr, flush=True)
    show(f"KV moves in one process beside memcpy, blocks of {chosen.block_size} positions", rows)
    record("kv", arguments).append(rows, chosen.out)
    return 0
