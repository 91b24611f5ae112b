"""A process of `bench kernels`: does the jobs that its one argument names, and tells what came of each.

    {"jobs": [[part, case, by, piece], ...], "options": {...}} -> lines of kernels_process.tell

An error that leaves the device whole (a shape that is refused, a program that does not compile, memory that is not
there) is a row of that job; any other ends the process, and the one that reads starts another.
"""

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax

from bench import kernels_check, kernels_library, kernels_loads, kernels_speed, kernels_step
from bench.kernels_process import Job, Row, tell
from bench.kernels_time import NoiseError, ceiling, device_facts
from bench.kernels_trial import trial

REFUSED = (ArithmeticError, AssertionError, LookupError, TypeError, ValueError, NotImplementedError)
HARMLESS = ("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT", "UNIMPLEMENTED")
LAST_CHARACTERS = 400


def main(arguments: list[str]) -> int:
    """Do every job."""
    work = json.loads(arguments[0])
    options = work["options"]
    for job in (Job(*words) for words in work["jobs"]):
        tell(job=job, began=True)
        try:
            for row in rows(job, options):
                tell(job=job, row=row)
        except (NoiseError, MemoryError) as error:
            tell(job=job, row={"skipped": str(error)})
        except REFUSED as error:
            tell(job=job, row={"error": said(error)})
        except jax.errors.JaxRuntimeError as error:
            if not str(error).startswith(HARMLESS):
                raise
            what = "skipped" if str(error).startswith("RESOURCE_EXHAUSTED") else "error"
            tell(job=job, row={what: said(error)})
        tell(job=job, done=True)
    return 0


def said(error: Exception) -> str:
    """An error in one line."""
    words = " ".join(str(error).split()) or "no word"
    return f"{type(error).__name__}: {words}"[:LAST_CHARACTERS]


def rows(job: Job, options: Mapping) -> Iterator[Row]:
    """What comes of one job, row after row."""
    small, memory = options["small"], options.get("memory_bytes") or 0
    if job.part == "facts":
        yield device_facts()
    elif job.part == "ceilings":
        yield ceiling(job.case, small)
    elif job.part == "check":
        config = kernels_check.tuned_for(job.case, job.piece, job.by)
        yield kernels_check.check(job.case, job.piece, job.by, small, config)
    elif job.part == "speed":
        case = kernels_speed.case_of(job.case, small)
        yield from kernels_speed.measure(case, job.by, memory, kernels_speed.tuned_for(case, job.by))
    elif job.part == "library":
        yield from kernels_library.measure(kernels_speed.case_of(job.case, small), job.by, memory)
    elif job.part == "step":
        yield kernels_step.measure(int(job.case), job.by, small, Path(options["dump"]))
    elif job.part == "tune":
        yield trial(job, options)
    elif job.part == "loads":
        yield kernels_loads.load(job.case, options["folder"])
    else:
        raise ValueError(f"part {job.part!r}: nobody does it")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
