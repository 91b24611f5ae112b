"""KV blocks from one process to another on this machine, beside copying as many bytes.

    memcpy | tcp | tls | unix | shared | nixl | some of them bare | memcpy | ... in turns -> ratios within each turn

tcp, unix   `Parts` as lanes exchange them: links of two processes, checksums taken by the one and verified by the
            other, into a fresh buffer of the receiver
tls         the same as tcp under mutual TLS 1.3, with certificates made for the purpose
shared      the same over a unix socket whose ends share memory: checksums of the bytes where they lie
nixl        the receiver's agent reads it out of the sender's memory; where the library is installed
bare        the same bytes the same way and nothing else (bench/wire_bare.py, bench/wire_nixl.py)

A ratio is the time of a memcpy, between two buffers that are warm, over that of the move: above 1 is faster. A few
parts are on their way at a time; the clock stops when the receiver has said that it has the last.
"""

import argparse
import asyncio
import queue
import secrets
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

import numpy as np

from bench.record import parser, record, show
from bench.wire_bare import TOGETHER, Bare, BareShared, lent, swallow
from bench.wire_nixl import BareNixl, installed, pulled
from engine.cluster import certs
from engine.core.handoff import Done, Parts
from engine.movers import addresses
from engine.movers.geometry import Geometry
from engine.movers.links import Limits, Links
from engine.movers.nixl import Nixl
from engine.movers.parts import Heads
from engine.movers.sockets import address_of, listening
from engine.movers.tls import Tls

KV_HEADS, HEAD_WIDTH, BLOCK = 8, 128, 16
LAYER_BYTES = 2 * KV_HEADS * BLOCK * HEAD_WIDTH * 2
SIZES = tuple(1 << power for power in (16, 18, 20, 22, 24, 26))
RUN_BYTES = 64 << 20  # small parts are repeated
MOST = 200  # times
WAYS = ("tcp", "tls", "unix", "shared", *["nixl"] * installed())
BARE = {"tcp": Bare, "unix": Bare, "shared": BareShared, **({"nixl": BareNixl} if installed() else {})}
TAKEN = {"shared": ("shared", "unshared"), "nixl": ("pulled", "unpulled")}


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
    plain = answering("target", size, secret, None)
    plain.start(["127.0.0.1:0", f"unix:{folder}/target.sock"])
    secured = answering("target", size, secret, Tls(Path(folder) / "certs" / "lane"))
    secured.start(["127.0.0.1:0"])
    mover = Nixl() if installed() else None
    moved = answering("target", size, secret, None, mover)
    moved.start(["127.0.0.1:0"])
    names = ("127.0.0.1:0", f"unix:{folder}/bare.sock", f"unix:{folder}/shared.sock", "127.0.0.1:0")
    bare = [listening(addresses.parse(each)) for each in names]
    links = plain, secured, moved
    print(*(found for each in links for found in each.addresses), *map(address_of, bare), flush=True)
    works = [lambda: asyncio.run(swallow(bare[:2], size)), lambda: lent(bare[2]), lambda: pulled(bare[3], size)]
    for work in works[: 2 + installed()]:
        threading.Thread(target=work, daemon=True).start()
    sys.stdin.read()
    for each in links:
        each.close()
    if mover is not None:
        mover.close()


def answering(name: str, size: int, secret: str, tls: Tls | None, mover: Nixl | None = None) -> Links:
    """Links that say Done for each part."""

    def heard(sender: str, message: object) -> None:
        assert isinstance(message, Parts) and message.staged is not None, "a part came damaged"
        links.post(sender, Done(message.handoff))

    about = part_of(size)[0], None, tls, None, mover
    links = Links(name, bytes.fromhex(secret), heard, lambda peer: None, *about)
    return links


# -- this one ------------------------------------------------------------------------------------------------------


class Way:
    """Parts over the links to an address."""

    def __init__(self, name: str, address: str, secret: bytes, size: int, tls: Tls | None):
        geometry, self._part = part_of(size)
        self._done: queue.SimpleQueue[object] = queue.SimpleQueue()
        limits = Limits() if name == "shared" else Limits(shared_bytes=0)
        self._mover = Nixl() if name == "nixl" else None
        self.links = Links(
            name,
            secret,
            lambda sender, message: self._done.put(message),
            lambda peer: None,
            geometry,
            tls=tls,
            limits=limits,
            mover=self._mover,
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

    def close(self) -> None:
        """End them."""
        self.links.close()
        if self._mover is not None:
            self._mover.close()


def measure(size: int, turns: int) -> dict[str, float]:
    """Medians over `turns`."""
    secret = secrets.token_bytes(32)
    with tempfile.TemporaryDirectory() as folder:
        certs.init(Path(folder) / "certs", "bench", [], datetime.now(UTC))
        tls = Tls(Path(folder) / "certs" / "lane")
        command = [sys.executable, "-m", "bench", "wire", "--serve", str(size), secret.hex(), folder]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
            assert other.stdin is not None and other.stdout is not None
            tcp, unix, secured, moved, *bare = other.stdout.readline().split()
            where = {"tcp": tcp, "tls": secured, "unix": unix, "shared": unix, "nixl": moved}
            whole = {name: Way(name, where[name], secret, size, tls if name == "tls" else None) for name in WAYS}
            kinds = zip(BARE.items(), bare, strict=False)
            ends = {f"{name} bare": kind(address, size) for (name, kind), address in kinds}
            runs = {name: each.run for name, each in (*whole.items(), *ends.items())}
            figures = _compare(runs, size, turns)
            for name, way in whole.items():
                figures |= _taken(name, way.links.counts)
            for end in (*whole.values(), *ends.values()):
                end.close()
            other.stdin.close()
    return figures


def _taken(name: str, counts: Mapping[str, int]) -> dict[str, float]:
    """How many parts in a hundred did go this way, and not through the socket."""
    if name not in TAKEN:
        return {}
    taken, not_taken = (counts[each] for each in TAKEN[name])
    return {f"{name} %": 100 * taken / max(taken + not_taken, 1)}


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
