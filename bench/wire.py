"""KV blocks from one process to another on this machine, beside copying as many bytes.

    memcpy | tcp | unix | tcp bare | unix bare | memcpy | ... in turns -> ratios within each turn

tcp, unix   `Parts` as lanes exchange them: links of two processes, checksums taken by the one and verified by the
            other, into a fresh buffer of the receiver
bare        the same bytes over the same kind of socket and nothing else, into a buffer that is warm

A ratio is the time of a memcpy, between two buffers that are warm, over that of the move: above 1 is faster. A few
parts are on their way at a time; the clock stops when the receiver has said that it has the last.
"""

import argparse
import asyncio
import contextlib
import queue
import secrets
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from statistics import median

import numpy as np

from bench.record import parser, record, show
from engine.core.handoff import Done, Parts
from engine.movers import addresses
from engine.movers.geometry import Geometry
from engine.movers.links import Links
from engine.movers.parts import Heads
from engine.movers.pipe import Pipe, PlainWire
from engine.movers.sockets import address_of, dial, listening

KV_HEADS, HEAD_WIDTH, BLOCK = 8, 128, 16
LAYER_BYTES = 2 * KV_HEADS * BLOCK * HEAD_WIDTH * 2
SIZES = tuple(1 << power for power in (16, 18, 20, 22, 24, 26))
TOGETHER = 4  # parts on their way
RUN_BYTES = 64 << 20  # small parts are repeated
MOST = 200  # times


def shape(size: int) -> tuple[int, int]:
    """(layers, blocks) of a part of `size` bytes."""
    units = size // LAYER_BYTES
    layers = min(units, 32)
    return layers, units // layers


def part_of(size: int) -> tuple[Geometry, Parts]:
    """A part of `size` bytes, and what its lane is."""
    layers, count = shape(size)
    geometry = Geometry(layers, KV_HEADS, HEAD_WIDTH, "float16", BLOCK, "", "")
    rng = np.random.default_rng(0)
    arrays = (rng.integers(0, 1 << 15, geometry.shape(count), np.uint16).view(np.float16) for _ in range(2))
    return geometry, Parts(0, 1, 0, count, Heads(*arrays))


# -- the other process ---------------------------------------------------------------------------------------------


def serve(size: int, secret: str, folder: str) -> None:
    """Say Done for each part, and one byte for as many that come bare, until the input ends."""
    geometry, _ = part_of(size)

    def heard(sender: str, message: object) -> None:
        assert isinstance(message, Parts) and message.staged is not None, "a part came damaged"
        links.post(sender, Done(message.handoff))

    links = Links("target", bytes.fromhex(secret), heard, lambda peer: None, geometry)
    links.start(["127.0.0.1:0", f"unix:{folder}/target.sock"])
    bare = [listening(addresses.parse(each)) for each in ("127.0.0.1:0", f"unix:{folder}/bare.sock")]
    print(*links.addresses, *(address_of(each) for each in bare), flush=True)
    threading.Thread(target=lambda: asyncio.run(_swallow(bare, size)), daemon=True).start()
    sys.stdin.read()
    links.close()


async def _swallow(listeners: list, size: int) -> None:
    async def accept(listener) -> None:
        pipe = Pipe(PlainWire((await asyncio.get_running_loop().sock_accept(listener))[0]))
        into = memoryview(bytearray(size))
        with contextlib.suppress(EOFError):
            while True:
                await pipe.fill(into)
                await pipe.send([b"x"])

    await asyncio.gather(*map(accept, listeners))


# -- this one ------------------------------------------------------------------------------------------------------


class Way:
    """Parts over the links to an address."""

    def __init__(self, address: str, secret: bytes, size: int):
        geometry, self._part = part_of(size)
        self._done: queue.SimpleQueue[object] = queue.SimpleQueue()
        name = f"source {address[:4]}"
        self.links = Links(
            name, secret, lambda sender, message: self._done.put(message), lambda peer: None, geometry
        )
        self.links.start()
        self.links.meet("target", address)

    def run(self, count: int) -> None:
        """Move `count` parts."""
        for number in range(count):
            if number >= TOGETHER:
                self._done.get(timeout=60)
            self.links.post("target", self._part)
        for _ in range(min(count, TOGETHER)):
            self._done.get(timeout=60)


class Bare:
    """The same bytes over a socket to an address, on a loop of its own."""

    def __init__(self, address: str, size: int):
        self._loop = asyncio.new_event_loop()
        self._pipe = self._loop.run_until_complete(dial(addresses.parse(address), None))
        self._pieces = [memoryview(np.ones(size, np.uint8))]

    def run(self, count: int) -> None:
        """Move them `count` times."""
        self._loop.run_until_complete(self._run(count))

    async def _run(self, count: int) -> None:
        for number in range(count):
            if number >= TOGETHER:
                await self._pipe.take(1)
            await self._pipe.send(self._pieces)
        await self._pipe.take(min(count, TOGETHER))

    def close(self) -> None:
        """End it."""
        self._pipe.close()
        self._loop.close()


def measure(size: int, turns: int) -> dict[str, float]:
    """Medians over `turns`."""
    secret = secrets.token_bytes(32)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "bench", "wire", "--serve", str(size), secret.hex(), folder]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
            assert other.stdin is not None and other.stdout is not None
            found = other.stdout.readline().split()
            ways = {name: Way(address, secret, size) for name, address in zip(("tcp", "unix"), found, strict=False)}
            bare = {f"{name} bare": Bare(address, size) for name, address in zip(ways, found[2:], strict=True)}
            figures = _compare({name: each.run for name, each in (ways | bare).items()}, size, turns)
            for each in ways.values():
                each.links.close()
            for each in bare.values():
                each.close()
            other.stdin.close()
    return figures


def _compare(runs: dict[str, Callable[[int], None]], size: int, turns: int) -> dict[str, float]:
    count = max(min(RUN_BYTES // size, MOST), 1)
    buffers = [np.full(size, fill, np.uint8) for fill in (1, 2)]

    def memcpy(times: int) -> None:
        for _ in range(times):
            np.copyto(*buffers)

    kinds = {"memcpy": memcpy, **runs}
    for run in kinds.values():
        run(count)
    rows = [{name: _seconds(run, count) for name, run in kinds.items()} for _ in range(turns)]
    figures = {"memcpy GB/s": size / median(row["memcpy"] for row in rows) / 1e9}
    for name in runs:
        figures[f"{name} GB/s"] = size / median(row[name] for row in rows) / 1e9
        figures[name] = median(row["memcpy"] / row[name] for row in rows)
    return figures


def _seconds(run: Callable[[int], None], count: int) -> float:
    began = time.perf_counter()
    run(count)
    return (time.perf_counter() - began) / count


def options() -> argparse.ArgumentParser:
    """What can be told."""
    lines = parser("wire", __doc__)
    lines.add_argument("--most", type=float, default=64, metavar="MiB", help="of the sizes up to 64 MiB (default)")
    lines.add_argument("--turns", type=int, default=9)
    lines.add_argument("--serve", nargs=3, metavar=("BYTES", "SECRET", "FOLDER"), help="be the other process")
    return lines


def main(arguments: list[str]) -> int:
    """Measure every size."""
    chosen = options().parse_args(arguments)
    if chosen.serve:
        serve(int(chosen.serve[0]), *chosen.serve[1:])
        return 0
    rows = []
    for size in (size for size in SIZES if size <= chosen.most * (1 << 20)):
        rows.append({"KiB": size >> 10, **measure(size, chosen.turns)})
        print(f"{size >> 10} KiB ...", file=sys.stderr, flush=True)
    show("KV from process to process on one machine beside memcpy", rows)
    record("wire", arguments).append(rows, chosen.out)
    return 0
