"""Runs jobs in processes that may die: what one job breaks is lost with that job alone.

    jobs --one process--> "began" -> rows of figures -> "done"   a line of JSON each, job after job
         <-- it ended early: the job it was at gets a row with an `error`, another process takes the rest

A kernel may abort its process, leave the device in an error that every later call meets, or never end; all three
come out as the end of the process. After `patience_s` without a line the process is ended, and after `limit_s` all
of it. Cost: a start (some 10 s on a GPU) for each process.
"""

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
WORD = "KERNELS "  # before what a process tells; other lines on its standard output are the compiler's
CHILD = ("-W", "ignore", "-m", "bench.kernels_child")
LAST_CHARACTERS = 400
Row = dict[str, object]


class Job(NamedTuple):
    """What a process is to do next."""

    part: str
    case: str
    by: str = ""
    piece: str = ""

    @property
    def words(self) -> str:
        """For a person."""
        return " ".join(word for word in self if word)


class Limits(NamedTuple):
    """In seconds."""

    limit_s: float
    patience_s: float = 240


def tell(**line: object) -> None:
    """From the process that works, for the one that reads."""
    print(WORD + json.dumps(line), flush=True)


def run(
    jobs: Sequence[Job],
    options: Mapping[str, object],
    limits: Limits,
    told: Callable[[Row], None],
    command: Sequence[str] = (sys.executable, *CHILD),
    environment: Mapping[str, str] | None = None,
) -> list[Row]:
    """All rows of `jobs`, each with the words of its job; one that was not reached has `skipped`."""
    end_at = time.monotonic() + limits.limit_s
    left, rows = list(jobs), []

    def keep(job: Job, row: Row) -> None:
        rows.append({"part": job.part, "case": job.case, "by": job.by, "piece": job.piece} | row)
        told(rows[-1])

    while left:
        if time.monotonic() >= end_at:
            for job in left:
                keep(job, {"skipped": "no time was left"})
            break
        at: Job | None = None
        with tempfile.TemporaryDirectory(prefix="serac-kernels-") as folder:
            errors = Path(folder) / "errors.log"
            spoken = lines(left, options, limits, end_at, errors, command, environment)
            for line in spoken:
                job = Job(*line["job"])
                if "began" in line:
                    at = job
                elif "row" in line:
                    keep(job, line["row"])
                elif "done" in line:
                    at = None
                    left.remove(job)
            if left:
                at = at if at in left else left[0]
                left.remove(at)
                keep(at, {"error": last_words(errors, end_at)})
    return rows


def lines(
    jobs: Sequence[Job],
    options: Mapping[str, object],
    limits: Limits,
    end_at: float,
    errors: Path,
    command: Sequence[str],
    environment: Mapping[str, str] | None,
) -> Iterator[dict]:
    """What one process tells, until it ends or is ended."""
    work = json.dumps({"jobs": jobs, "options": dict(options)})
    with errors.open("w") as log:
        process = subprocess.Popen(
            [*command, work],
            env=surroundings(environment or {}),
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            cwd=ROOT,
        )
    heard: queue.Queue[str | None] = queue.Queue()
    reader = threading.Thread(target=_listen, args=(process, heard), daemon=True)
    reader.start()
    try:
        while (wait_s := min(limits.patience_s, end_at - time.monotonic())) > 0:
            words = heard.get(timeout=wait_s)
            if words is None:
                break
            if words.startswith(WORD):
                yield json.loads(words.removeprefix(WORD))
    except queue.Empty:
        with errors.open("a") as log:
            log.write(f"\nErrors: said nothing for {wait_s:.0f} s and was ended\n")
    finally:
        process.kill()
        process.wait()
        reader.join()
        process.stdout.close()


def surroundings(changes: Mapping[str, str]) -> dict[str, str]:
    """The environment of a process that finds this code, whatever else is on its path."""
    places = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(places), **changes}


def _listen(process: subprocess.Popen, heard: queue.Queue) -> None:
    for words in process.stdout:
        heard.put(words)
    heard.put(None)


def last_words(errors: Path, end_at: float) -> str:
    """The line that says why a process ended."""
    said = errors.read_text(errors="replace").strip().splitlines() or ["its process ended without a word"]
    telling = [line for line in said if "ERROR" in line or "Error" in line or "CUDA_" in line]
    late = "no time was left; " if time.monotonic() >= end_at else ""
    return late + (telling or said)[-1].strip()[-LAST_CHARACTERS:]
