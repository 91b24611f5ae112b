"""Lets the tests of this folder import `fake_replica` beside them, and lends them a running server."""

import asyncio
import sys
import threading
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from fake_replica import FakeReplica, serving  # noqa: E402


@pytest.fixture(scope="module")
def server():
    """A server on a thread of its own; yields its replica and addresses."""
    ready, stop, shared = threading.Event(), threading.Event(), {}

    async def run():
        replica = FakeReplica(0.001)
        async with serving(replica) as client:
            shared["replica"], shared["addresses"] = replica, client.addresses
            ready.set()
            await asyncio.to_thread(stop.wait)

    thread = threading.Thread(target=lambda: asyncio.run(run()))
    thread.start()
    assert ready.wait(10)
    yield shared["replica"], shared["addresses"]
    stop.set()
    thread.join()
