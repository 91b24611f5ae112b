"""Faults one after the other under load, drawn from a seed: processes killed and stopped, networks that damage,
swallow and delay, clients that leave. After each, every stream is held against the same request alone.

CI runs 8; `SERAC_FAULTS=300 pytest tests/faults/test_storm.py -s` runs more and says how long everything took;
`SERAC_STOPS=60` stops processes for so many seconds.
"""

import importlib.util
import os
import random
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.faults.cluster import Cluster
from tests.faults.test_faults import SLOTS, settle, some

FAULTS = int(os.environ.get("SERAC_FAULTS", "8"))
STOPS = [float(seconds) for seconds in os.environ.get("SERAC_STOPS", "0.5 0.5 5").split()]
STREAMS = 12


def load_proxy():
    """The module of tests/engine/movers, which no package holds."""
    path = Path(__file__).parents[1] / "engine" / "movers" / "proxy.py"
    spec = importlib.util.spec_from_file_location("serac_test_proxy", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


proxy = load_proxy()


class Storm:
    """A cluster whose lanes reach the front through proxies, and what befell it."""

    def __init__(self):
        self.proxies: dict[str, proxy.Proxy] = {}
        self.cluster = Cluster(SLOTS, self._way)
        self.noticed: dict[str, list[float]] = {}
        self.freed: list[float] = []
        self.kinds: Counter[str] = Counter()

    def _way(self, slot: str, address: str) -> str:
        if slot not in self.proxies:
            made = self.proxies[slot] = proxy.Proxy(int(address.rpartition(":")[2]), seed=len(self.proxies))
            made.__enter__()
        return self.proxies[slot].address

    def close(self):
        self.cluster.close()
        for each in self.proxies.values():
            each.__exit__(None, None, None)

    def kill(self, slot, rng):
        name = self.cluster.lane(slot)
        self.cluster.kill(slot)
        self._notice("killed", name, 1.0)
        self.cluster.start(slot)

    def stop(self, slot, rng):
        seconds = rng.choice(STOPS)
        name = self.cluster.lane(slot)
        self.cluster.pause(slot, seconds)
        if seconds > 3.0:
            self._notice("stopped", name, 4.0)

    def damage(self, slot, rng):
        self._disturb(slot, proxy.Faults(flip=0.2, late=0.2))

    def swallow(self, slot, rng):
        name = self.cluster.lane(slot)
        self.proxies[slot].faults = proxy.Faults(mute=1.0)
        self._notice("cut off", name, 4.0)
        self.proxies[slot].faults = proxy.CALM

    def delay(self, slot, rng):
        self._disturb(slot, proxy.Faults(late=0.7, late_s=0.2, torn=0.1))

    def reset(self, slot, rng):
        self._disturb(slot, proxy.Faults(drop=0.3, half=0.1))

    def cancel(self, slot, rng):
        for answer in list(self.cluster.answers.values())[-STREAMS:]:
            if rng.random() < 0.5:
                self.cluster.replica.abort(answer.request.request_id)

    def _disturb(self, slot, faults, seconds=1.0):
        self.proxies[slot].faults = faults
        time.sleep(seconds)
        self.proxies[slot].faults = proxy.CALM

    def _notice(self, kind, name, seconds):
        took = self.cluster.wait(lambda: name not in self.cluster.lanes, seconds)
        self.noticed.setdefault(kind, []).append(took)


KINDS = (Storm.kill, Storm.stop, Storm.damage, Storm.swallow, Storm.delay, Storm.reset, Storm.cancel)


@pytest.fixture(scope="module")
def storm():
    made = Storm()
    yield made
    made.close()


def test_streams_go_on_token_for_token_through_every_fault(storm):
    rng, answered = random.Random(17), 0
    for number in range(FAULTS):
        kind, slot = KINDS[number % len(KINDS)], rng.choice(list(SLOTS))
        answers = some(storm.cluster, STREAMS, f"storm {number}")
        time.sleep(rng.uniform(0.0, 0.2))
        kind(storm, slot, rng)
        storm.freed.append(settle(storm.cluster, answers, 60.0, 20.0 + max(STOPS)))
        storm.kinds[kind.__name__] += 1
        answered += len(answers)
    slowest = {kind: f"{max(times):.2f} s" for kind, times in storm.noticed.items()}
    print(
        f"\n{sum(storm.kinds.values())} faults {dict(storm.kinds)}, {answered} requests right, "
        f"{storm.cluster.replica.router.recoveries} choices went on elsewhere; noticed within {slowest}; "
        f"blocks back after {max(storm.freed):.2f} s at most"
    )
    assert storm.cluster.replica.router.recoveries > 0 and max(storm.freed) < 5.0
