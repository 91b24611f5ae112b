"""NIXL itself: it moves bytes from process to process, fails in bounds, and says nothing on stdout.

`pip install --no-deps nixl nixl-cu12` (it is no extra, as its metadata demands torch); skipped where it is missing.
"""

import asyncio
import contextlib
import gc
import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from ends import End, crosses, part, until

from engine.errors import ConfigError
from engine.movers import nixl as module
from engine.movers.nixl import INSTALL, Nixl
from engine.movers.staging import region_of

ROOT = Path(__file__).parents[3]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
needs_nixl = pytest.mark.skipif(
    importlib.util.find_spec("nixl") is None, reason=f"nixl is not installed here: {INSTALL}"
)
MiB = 1 << 20


def test_where_it_is_missing_the_message_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "nixl", None)
    with pytest.raises(ConfigError, match="pip install --no-deps nixl nixl-cu12") as found:
        Nixl(MiB)
    assert found.value.field == "kv_mover"


@pytest.fixture(scope="module")
def agents():
    """Two of one process, that need half a second each to begin; the first is read from all the time."""
    made = [Nixl(2 * MiB) for _ in range(2)]
    made[0].watch(1)
    yield made
    for each in made:
        each.close()


def fetch(reader, peer, source, size=4096, limit_s=5.0):
    async def read():
        into = reader.landing.cut(size)
        await reader.read(peer, source._replace(num_bytes=size), into, limit_s)
        return into

    return asyncio.run(read())


@needs_nixl
def test_bytes_are_read_out_of_another_agents_staging(agents):
    here, there = agents
    peer = asyncio.run(there.meet(here.metadata))
    sent = np.random.default_rng(1).integers(0, 256, MiB, np.uint8)
    here.staging.room(4096, 4096 + MiB)[:] = sent
    address = here.staging.region.address + 4096
    assert np.array_equal(fetch(there, peer, here.staging.region._replace(address=address), MiB), sent)
    until(lambda: there.landing.cut(2 * MiB) is not None)  # nobody holds it any more
    there.forget(peer)


@needs_nixl
@pytest.mark.parametrize("place", ["landing", "beyond", "anywhere"])
def test_what_was_not_offered_cannot_be_read(agents, place):
    here, there = agents
    peer = asyncio.run(there.meet(here.metadata))
    start, size = here.staging.region[:2]
    address = {"landing": here.landing.region.address, "beyond": start + size - 64, "anywhere": 1 << 40}[place]
    with pytest.raises(OSError, match="NotFound"):
        fetch(there, peer, here.staging.region._replace(address=address))
    there.forget(peer)


@needs_nixl
def test_metadata_that_is_not_whole_is_an_error_and_leaves_others_as_they_are(agents):
    """One whose addresses somebody made up can crash the library; who may offer any has the cluster's secret."""
    here, there = agents
    rng = np.random.default_rng(3)
    whole = here.metadata
    for number in range(60):
        data = whole.replace(whole[:32], rng.bytes(16).hex().encode())
        start = int(rng.integers(len(data)))
        for garbage in (data[:start], data[:32] + data[start:], data[:32] + rng.bytes(number), rng.bytes(number)):
            with pytest.raises(OSError, match="nixl: "):
                asyncio.run(there.meet(garbage))
    with pytest.raises(OSError, match="nixl: "):
        asyncio.run(there.meet(b"garbage"))
    with pytest.raises(OSError, match="under the name of another"):
        asyncio.run(there.meet(b"x" * 32 + whole[32:]))
    peer = asyncio.run(there.meet(whole))
    with pytest.raises(OSError, match="under the name of another"):
        asyncio.run(there.meet(whole[:-1]))
    fetch(there, peer, here.staging.region)
    there.forget(peer)


@needs_nixl
def test_a_buffer_of_a_device_is_read_where_it_lies(agents):
    """As far as a host can tell: what JAX calls a device is its memory here."""
    here, there = agents
    array = jax.block_until_ready(jax.random.bits(jax.random.key(0), (MiB,), np.uint8))
    region = region_of(array.addressable_shards[0].data)
    peer = asyncio.run(there.meet(asyncio.run(here.register(region))))
    assert np.array_equal(fetch(there, peer, region, MiB), np.asarray(array))
    there.forget(peer)


@needs_nixl
def test_who_reads_nothing_costs_no_time(agents):
    agents[0].watch(-1)
    time.sleep(0.1)
    before = time.process_time()
    time.sleep(0.5)
    took = time.process_time() - before
    agents[0].watch(1)
    assert took < 0.05


@needs_nixl
def test_after_its_end_everything_fails_at_once():
    ended = Nixl(MiB)
    ended.close()
    with pytest.raises(OSError, match="ended"):
        asyncio.run(ended.meet(ended.metadata))
    with pytest.raises(OSError, match="ended"):
        fetch(ended, b"any", ended.staging.region)
    assert len(ended.landing.slots) == 1 and ended.landing.cut(2 * MiB) is None


@needs_nixl
def test_devices_that_are_not_there_are_a_config_error():
    with pytest.raises(ConfigError, match="does not work here"):
        Nixl(MiB, devices="nosuch0")


QUIET = """
import asyncio, contextlib, logging, os, pathlib
before = dict(os.environ), logging.raiseExceptions
from engine.movers.nixl import Nixl
made = [Nixl(1 << 20) for _ in range(2)]
for metadata in (b"garbage", made[1].metadata[:200], made[1].metadata):
    with contextlib.suppress(OSError):
        asyncio.run(made[0].meet(metadata))
assert before == (dict(os.environ), logging.raiseExceptions)
sockets = set()
for each in os.listdir("/proc/self/fd"):
    with contextlib.suppress(OSError):
        sockets.add(os.readlink(f"/proc/self/fd/{each}"))
tables = [pathlib.Path("/proc/net", name).read_text() for name in ("tcp", "tcp6")]
rows = [row.split() for table in tables for row in table.splitlines()]
listening = [row[1] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in sockets]
assert len(listening) == 2 and all(address.startswith("0100007F:") for address in listening), listening
for each in made:
    each.close()
"""


@needs_nixl
def test_it_prints_nothing_listens_at_the_loopback_alone_and_leaves_the_environment_as_it_was():
    done = subprocess.run(
        [sys.executable, "-c", QUIET], env=ENVIRONMENT, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# -- over a network, as far as one host has it: UCX_TLS=tcp ------------------------------------------------------


HOLDER = """
import os, sys
from engine.movers.nixl import Nixl
made = Nixl(64 << 20)
made.staging.room(0, 64 << 20)[:] = 7
made.watch(1)
print(made.staging.region.address, made.metadata.hex(), flush=True)
sys.stdin.read()
made.close()
"""


@contextlib.contextmanager
def holder():
    """A process that offers 64 MiB; and how to get at them."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER],
        env=ENVIRONMENT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        address, metadata = process.stdout.readline().split()
        yield process, int(address), bytes.fromhex(metadata)
        process.kill()


@pytest.fixture
def over_tcp(monkeypatch):
    monkeypatch.setenv("UCX_TLS", "tcp")
    made = Nixl(64 * MiB)
    yield made
    made.close()


@needs_nixl
def test_a_process_that_is_stopped_amid_a_read_is_given_up_and_writes_late_where_nobody_else_reads(over_tcp):
    """The bytes do come later, whatever the library was told; the slot is not used again before they have."""
    size = 32 * MiB
    with holder() as (process, address, metadata):
        peer = asyncio.run(over_tcp.meet(metadata))
        source = over_tcp.staging.region._replace(address=address)
        assert fetch(over_tcp, peer, source)[0] == 7
        process.send_signal(signal.SIGSTOP)
        began = time.monotonic()
        with pytest.raises(TimeoutError):
            fetch(over_tcp, peer, source, size, limit_s=0.3)
        assert time.monotonic() - began < 1.0
        other = over_tcp.landing.cut(size)
        assert other is not None and over_tcp.landing.cut(size // 2) is None, "the slot is not free"
        over_tcp.forget(peer)
        process.send_signal(signal.SIGCONT)

        until(lambda: gc.collect() is not None and over_tcp.landing.cut(size) is not None)
        assert not other.any(), "and nothing was written elsewhere"


@needs_nixl
def test_a_process_that_is_killed_amid_a_read_ends_it_with_an_error(over_tcp):
    with holder() as (process, address, metadata):
        peer = asyncio.run(over_tcp.meet(metadata))
        source = over_tcp.staging.region._replace(address=address)
        fetch(over_tcp, peer, source)

        async def killed():
            read = asyncio.create_task(over_tcp.read(peer, source._replace(num_bytes=MiB * 32), into, 5.0))
            process.send_signal(signal.SIGSTOP)
            await asyncio.sleep(0.1)
            process.send_signal(signal.SIGKILL)
            await read

        into = over_tcp.landing.cut(32 * MiB)
        with pytest.raises(OSError, match="Disconnect|ERR"):
            asyncio.run(killed())
        with pytest.raises(OSError, match="Disconnect"):
            fetch(over_tcp, peer, source)
        over_tcp.forget(peer)


@needs_nixl
def test_a_sender_whose_agent_hangs_costs_one_wait_and_the_socket_takes_the_part(over_tcp, monkeypatch):
    """The agent of the sender gets no turns, as if it hung; its links live on."""
    sender = Nixl(MiB)
    here, there = End("p0", "127.0.0.1:0", mover=sender), End("d0", "127.0.0.1:0", mover=over_tcp)
    try:
        here.links.meet("d0", there.links.addresses[0])
        assert crosses(here, there, part(0))
        until(lambda: here.counts["pulled"] == 1)
        monkeypatch.setattr(module.Agent, "turn", lambda self: 0.01)
        for number in range(1, 4):
            assert crosses(here, there, part(number))
        assert there.counts["unread"] == 1 and here.counts["unpulled"] == 1 and not there.counts["ended"]
    finally:
        monkeypatch.undo()
        here.close()
        there.close()
