"""Work of other processes that is begun with the run and asked for near its end: minutes that the suite leaves to a
second core.

    collected --begin--> one thread, one job after the other, at low priority --> futures, `result` waits for them

Where nothing was begun, as in a run of a few tests, `result` does the job itself.
"""

import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future

import pytest

BEGUN = pytest.StashKey[dict[str, Future]]()  # of the run's configuration
NICE = 10


def begin(config: pytest.Config, jobs: Mapping[str, Callable[[], object]]) -> None:
    """Start the jobs. Their processes share the low priority of the thread."""
    config.stash[BEGUN] = futures = {name: Future() for name in jobs}

    def work() -> None:
        os.nice(NICE)  # of this thread alone, on Linux
        for name, job in jobs.items():
            try:
                futures[name].set_result(job())
            except BaseException as error:  # a skip is no Exception
                futures[name].set_exception(error)

    threading.Thread(target=work, daemon=True, name="early").start()


def result(config: pytest.Config, name: str, job: Callable[[], object]):
    """What the job gave, or raises what it raised."""
    future = config.stash.get(BEGUN, {}).get(name)
    return job() if future is None else future.result()
