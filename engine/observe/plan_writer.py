"""Writes a lane's plan log without holding up the lane.

    lane's thread: encode, queue | thread of the log: checksums, a batch of what is queued --one write--> file

When the disk refuses, QUEUE_BYTES wait, the file has its full size or a step is larger than a record may be, the
log stops, says so once and serving goes on: what is in the file is then the beginning of what happened. A log holds
the token ids of prompts and answers, so it is kept from others: its folder has mode 0700, its files 0600.
Cost on the lane's thread, of a plan and its result between steps, waking the other thread included: 60 us at 1 and
at 64 rows, 65 us at 4,096, 180 us at 4,096 full points; most of it is cold caches (two shared cores, EPYC).
Nothing is synced: a killed process loses what was queued in the last milliseconds, a machine that loses power more.
"""

import atexit
import logging
import os
import queue
import re
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from engine.core.plan import StepPlan, StepResult
from engine.errors import ConfigError, Malformed, wrong
from engine.observe.plan_bytes import INT, encode_plan, encode_result
from engine.observe.plan_log import (
    FAILURE,
    FRAME,
    HEADER,
    MAGIC,
    MOVED,
    PLAN,
    RESET,
    RESULT,
    Failure,
    Header,
    encode_record,
    frame,
)

QUEUE_BYTES = 64 << 20
BATCH_BYTES = 1 << 20
CLOSE_S = 5.0
MOST_FILES = 9999

logger = logging.getLogger("serac.plan_log")


class PlanWriter:
    """One lane's log, open. The lane's thread adds to it; `flush` and `close` may be called from any thread.

    told  is called once with the reason, one of metrics.LOG_STOPS, when the log stops before its lane does
    """

    def __init__(self, file: int, header: Header, max_bytes: int, told: Callable[[str], None] = lambda _: None):
        self.stopped = ""  # the reason; "closed" after `close`
        self._file, self._max_bytes, self._told = file, max_bytes, told
        self._queue: queue.SimpleQueue[tuple[int, bytes] | threading.Event | None] = queue.SimpleQueue()
        self._queued = self._written = len(MAGIC)
        self._lock = threading.Lock()
        self._add(HEADER, encode_record(header))
        self._thread = threading.Thread(target=self._write, name=f"plan-log-{header.lane}", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def plan(self, plan: StepPlan) -> None:
        """A step is about to be launched."""
        self._encode(PLAN, encode_plan, plan)

    def result(self, result: StepResult) -> None:
        """A step was collected."""
        self._encode(RESULT, encode_result, result)

    def failure(self, step: int, at: str, error: BaseException) -> None:
        """A launch or a collect raised."""
        self._add(FAILURE, encode_record(Failure(step, at, type(error).__name__)))

    def reset(self) -> None:
        """The device is made anew."""
        self._add(RESET, b"")

    def moved(self, blocks: Sequence[int]) -> None:
        """Blocks are written from outside the lane."""
        self._add(MOVED, np.asarray(blocks, INT).tobytes())

    def flush(self) -> None:
        """Wait until all that was added is in the file."""
        done = threading.Event()
        self._queue.put(done)
        done.wait(CLOSE_S)

    def close(self) -> None:
        """Write what is queued and let go of the file; what is added afterwards is not written."""
        with self._lock:
            self.stopped = self.stopped or "closed"
        self._queue.put(None)
        self._thread.join(CLOSE_S)
        atexit.unregister(self.close)

    def _encode(self, kind: int, encode: Callable, what: StepPlan | StepResult) -> None:
        if self.stopped:
            return
        try:
            body = encode(what)
        except (Malformed, ValueError, OverflowError):
            self._stop("record", "a step does not fit a record")
        else:
            self._add(kind, body)

    def _add(self, kind: int, body: bytes) -> None:
        if self.stopped:
            return
        size = FRAME.size + len(body)
        if self._queued + size > self._max_bytes:
            self._stop("size", f"its file has the {self._max_bytes} bytes of plan_log_size")
        elif self._queued + size - self._written > QUEUE_BYTES:
            self._stop("queue", f"{QUEUE_BYTES} bytes wait for the disk")
        else:
            self._queued += size
            self._queue.put((kind, body))

    def _stop(self, reason: str, words: str) -> None:
        with self._lock:
            first, self.stopped = not self.stopped, self.stopped or reason
        if first:
            logger.warning("the plan log stops: %s; serving goes on", words)
            self._told(reason)

    def _write(self) -> None:
        """The main function of the log's thread."""
        batch = bytearray(MAGIC)
        while True:
            item = self._queue.get()
            if isinstance(item, tuple):
                batch += frame(*item)
            if not isinstance(item, tuple) or len(batch) >= BATCH_BYTES or self._queue.empty():
                self._write_batch(batch)
                batch = bytearray()
            if isinstance(item, threading.Event):
                item.set()
            elif item is None:
                os.close(self._file)
                return

    def _write_batch(self, data: bytearray) -> None:
        rest = memoryview(data)
        try:
            while rest and self.stopped != "disk":
                rest = rest[os.write(self._file, rest) :]
        except OSError as error:
            self._stop("disk", f"its file cannot be written ({error.strerror})")
        self._written += len(data)


def open_log(
    folder: Path, header: Header, max_bytes: int, told: Callable[[str], None] = lambda _: None
) -> PlanWriter:
    """A new file in `folder`, beside what is there. Raises ConfigError for a folder that others can look into."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
        if status.st_mode & 0o077 or status.st_uid != os.geteuid():
            got = f"a folder of mode {status.st_mode & 0o777:04o}"
            expected = f"0700, owned by this user: it will hold prompts as token ids; chmod 700 {folder}"
            raise ConfigError(wrong("plan_log", got, expected), field="plan_log")
        path, file = _fresh(folder, re.sub(r"[^\w-]", "-", header.lane))
    except OSError as error:
        expected = f"a folder that can be written ({error.strerror})"
        raise ConfigError(wrong("plan_log", folder, expected), field="plan_log") from None
    logger.warning("%s will hold the token ids of all prompts and answers; whoever reads it reads them", path)
    return PlanWriter(file, header, max_bytes, told)


def _fresh(folder: Path, lane: str) -> tuple[Path, int]:
    """A file that was not there before, open for appending."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
    for number in range(1, MOST_FILES + 1):
        path = folder / f"lane-{lane}-{number:04d}.plans"
        try:
            return path, os.open(path, flags, 0o600)
        except FileExistsError:
            continue
    raise ConfigError(wrong("plan_log", folder, f"fewer than {MOST_FILES} logs of lane {lane}"), field="plan_log")
