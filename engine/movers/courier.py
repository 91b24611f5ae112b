"""Brings parts from lane to lane within one process, on a thread of its own.

    send(part) -> queue -> wait for the gather -> carry -> compare checksums -> deliver(part), or without its bytes

A lane's loop only puts a part in the queue. The checksum is over logical content (engine/movers/checksums.py), so
it holds whatever the two meshes; where devices share their memory nothing is copied or left to compare.
A part that does not arrive whole is delivered empty: the target asks for it again (engine/core/handoff.py).
"""

import logging
import queue
import threading
from collections.abc import Callable, Mapping

import numpy as np

from engine.core.handoff import Parts
from engine.errors import DeviceError
from engine.movers.checksums import checksums
from engine.movers.local import Carrier, host_shards

logger = logging.getLogger("serac.movers")

Deliver = Callable[[str, str, Parts], None]  # (to whom, from whom, what)


class LocalCourier:
    """`carriers` by (from, to); `verify` compares what leaves with what arrives, on the host."""

    def __init__(self, carriers: Mapping[tuple[str, str], Carrier], deliver: Deliver, verify: bool):
        self._carriers, self._deliver, self._verify = carriers, deliver, verify
        self._queue: queue.SimpleQueue[tuple[str, str, Parts] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="courier", daemon=True)
        self._thread.start()

    def send(self, sender: str, receiver: str, part: Parts) -> None:
        """Bring `part`, whose `staged` is on the sender's mesh; returns at once."""
        self._queue.put((sender, receiver, part))

    def stop(self) -> None:
        """Bring what is queued, then end the thread."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            sender, receiver, part = item
            self._deliver(receiver, sender, part._replace(staged=self._carry(sender, receiver, part)))

    def _carry(self, sender: str, receiver: str, part: Parts) -> object | None:
        carrier, staged = self._carriers[sender, receiver], part.staged
        assert isinstance(staged, tuple)
        try:
            if carrier.shared:
                return carrier.carry(_there(staged))
            before = self._checksums(staged, part.num_blocks)
            moved = carrier.carry(staged)
            whole = np.array_equal(before, self._checksums(moved, part.num_blocks))
        except (DeviceError, RuntimeError) as error:  # the device failed, or a transfer did
            logger.warning("blocks from lane %s to %s were lost: %s", sender, receiver, type(error).__name__)
            return None
        return moved if whole else None

    def _checksums(self, staged: tuple, count: int) -> np.ndarray:
        """Of each head, in order; waits for the device."""
        if not self._verify:
            _there(staged)
            return np.zeros(0)
        shards = host_shards(staged, count)
        return np.concatenate([checksums(shard.keys_KLnCH, shard.values_KLnCH) for shard in shards])


def _there(staged: tuple) -> tuple:
    """`staged`, once the device has made it."""
    for array in staged:
        array.block_until_ready()
    return staged
