"""Two replicas, and the programs of gateways and clients, for every test of this folder."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.gateway import python
from tests.gateway.scene import Replica


@pytest.fixture(scope="module")
def programs():
    """The folder of smg, envoy and a Python that has openai."""
    return python.folder()


@pytest.fixture
def make_replicas(programs, tmp_path):
    """Starts replicas side by side, each with its own flags; they are gone when the test is."""
    made = []

    def make(*flags, secret=""):
        logs = [tmp_path / f"replica{len(made) + k}.log" for k in range(len(flags))]
        new = [Replica(log, *each, secret=secret) for log, each in zip(logs, flags, strict=True)]
        made.extend(new)
        with ThreadPoolExecutor() as pool:
            return list(pool.map(Replica.up, new))

    yield make
    for replica in made:
        replica.kill()
