"""Whatever strangers send to the ports of a cluster, its streams go on token for token and nothing grows.

CI sends 600 to each port; `SERAC_FRAMES=10000 pytest tests/faults/test_frames.py -s` sends as many as that.
"""

import contextlib
import os
import queue
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

import pytest

from engine.cluster import certs
from engine.core.handoff import Fetch
from engine.movers.addresses import Address
from engine.movers.links import Links
from engine.movers.tls import Tls
from engine.replica import orders
from engine.replica.team import meet_followers, meet_leader
from tests.faults import hostile
from tests.faults.cluster import Cluster
from tests.faults.test_faults import some
from tests.faults.worker import GEOMETRY

FRAMES = int(os.environ.get("SERAC_FRAMES", "600"))
SLOTS = {"p0": "prefill", "d0": "decode"}
THREADS = 6
SECRET = bytes(range(32))
MOST_GROWN = 32 << 20
LOOPBACK = ("127.0.0.1", "::1", "::ffff:127.0.0.1")

pytestmark = pytest.mark.skipif(not os.path.exists("/proc/net/tcp"), reason="needs /proc to see who listens where")


@pytest.fixture(scope="module")
def cluster():
    with Cluster(SLOTS) as made:
        yield made


def ports(cluster):
    """Those of the workers, and that of the front, which this process is."""
    links = cluster.replica.remote.links
    names = {address.port: name for name, address in links._known.items()}
    front = int(links.addresses[0].rpartition(":")[2])
    found = [each for each in hostile.listeners(os.getpid()) if each.port == front]
    for process in cluster.processes.values():
        found += hostile.listeners(process.pid)
    for each in found:
        each.name = links.name if each.port == front else names.get(each.port, "")
    return found


def test_nobody_listens_beyond_this_machine(cluster):
    found = ports(cluster)
    assert len(found) >= 1 + len(SLOTS) and {each.host for each in found} <= set(LOOPBACK), found


def attack(there, trap, secret, seed):
    """How many connections were made; a twentieth of them by somebody who knows the secret."""
    drawn = hostile.Hostile(seed, trap, hostile.recorded(there, secret) if there.name else b"")
    for number in range(FRAMES // THREADS):
        if there.name and number % 20 == 0:
            hostile.as_member(there, secret, f"{seed}.{number}", drawn.nonsense())
        else:
            hostile.send(there, drawn.draw(), drawn.rng.random() < 0.1)
    return FRAMES // THREADS


def stream(cluster, busy, tag):
    """Ask again and again for as long as `busy`; how many answers came, each held against the same alone."""
    count = 0
    while busy() or not count:
        answers = some(cluster, 6, f"{tag} {count}")
        cluster.wait(lambda: all(answer.ended for answer in answers), 60.0)  # noqa: B023
        assert all(answer.right() for answer in answers)
        count += len(answers)
    return count


def test_frames_of_strangers_harm_nobody(cluster, tmp_path):
    cluster.wait(lambda: cluster.restored, 5.0)
    stream(cluster, lambda: False, "before")  # connections that a handoff makes are there then
    lanes, found, trap = set(cluster.lanes), ports(cluster), tmp_path / "trap"
    pids = [os.getpid(), *(process.pid for process in cluster.processes.values())]
    before = {pid: hostile.descriptors(pid) for pid in pids}
    memory = {process.pid: hostile.resident_bytes(process.pid) for process in cluster.processes.values()}
    counts = cluster.replica.remote.links.counts
    refused, began = counts["refused"], time.monotonic()
    with ThreadPoolExecutor(THREADS) as pool:
        jobs = [pool.submit(attack, each, trap, cluster.secret, seed) for each in found for seed in range(THREADS)]
        answered = stream(cluster, lambda: not all(job.done() for job in jobs), "during")
        sent = sum(job.result() for job in jobs)
    took_s = time.monotonic() - began
    assert set(cluster.lanes) == lanes and cluster.replica.router.recoveries == 0, "a lane was lost"
    assert not trap.exists(), "somebody loaded a pickle"
    cluster.wait(lambda: {pid: hostile.descriptors(pid) for pid in pids} == before, 10.0)
    cluster.wait(lambda: cluster.restored, 5.0)
    assert counts["refused"] + counts["malformed"] - refused > sent / len(found) / 2
    cluster.replica.router.check()
    grown = max(hostile.resident_bytes(pid) - bytes_before for pid, bytes_before in memory.items())
    assert grown < MOST_GROWN, f"a worker has {grown >> 20} MiB more"
    print(f"\n{sent} connections of strangers to {len(found)} ports in {took_s:.1f} s, {answered} requests right")
    print(f"a worker has grown by {grown / 2**20:.1f} MiB at most")
    print(f"at the front: {dict(counts)}")


@pytest.fixture
def behind_tls(tmp_path):
    """Links of a front that echoes and of a lane: (folder of certificates, front, lane, what the lane heard)."""
    certs.init(tmp_path / "certs", "prod", [], datetime.now(UTC))
    heard = queue.SimpleQueue()
    front = Links("front", SECRET, lambda peer, said: front.post(peer, said), lambda peer: None,
                  tls=Tls(tmp_path / "certs" / "front"))  # fmt: skip
    lane = Links("d0", SECRET, lambda peer, said: heard.put(said), lambda peer: None,
                 tls=Tls(tmp_path / "certs" / "lane"))  # fmt: skip
    with contextlib.closing(front), contextlib.closing(lane):
        front.start(["127.0.0.1:0"])
        lane.start()
        lane.meet("front", front.addresses[0])
        yield tmp_path / "certs", front, lane, heard


def attack_tls(there, folder, trap, seed):
    drawn = hostile.HostileTls(seed, trap, folder / "lane")
    for _ in range(FRAMES // THREADS // 2):
        drawn.send(there)
    return FRAMES // THREADS // 2


def test_frames_of_strangers_to_a_tls_port_harm_nobody(behind_tls, tmp_path):
    """What is no TLS, spoiled handshakes, and nonsense of somebody who has a certificate and not the secret."""
    folder, front, lane, heard = behind_tls
    there, trap = (
        hostile.Listener(os.getpid(), "127.0.0.1", int(front.addresses[0].rpartition(":")[2])),
        tmp_path / "t",
    )
    lane.post("front", Fetch(0, 1, 2, 3))
    assert heard.get(timeout=5) == Fetch(0, 1, 2, 3)
    before, number = hostile.descriptors(os.getpid()), 0
    with ThreadPoolExecutor(THREADS) as pool:
        jobs = [pool.submit(attack_tls, there, folder, trap, seed) for seed in range(THREADS)]
        while not all(job.done() for job in jobs):
            number += 1
            lane.post("front", Fetch(number, 1, 2, 3))
            assert heard.get(timeout=5) == Fetch(number, 1, 2, 3)
        sent = sum(job.result() for job in jobs)
    deadline = time.monotonic() + 10
    while hostile.descriptors(os.getpid()) != before:
        assert time.monotonic() < deadline, "descriptors are left"
        time.sleep(0.01)
    assert not trap.exists() and front.counts["connected"] == 1 and front.counts["refused"] > sent / 2
    print(f"\n{sent} connections of strangers to a TLS port, {number} messages beside them: {dict(front.counts)}")


def test_frames_of_strangers_to_the_door_of_a_lane_keep_no_follower_out(tmp_path):
    """The leader of a lane that spans processes listens while they come."""
    lost = []
    with socket.create_server(("127.0.0.1", 0)) as door, ThreadPoolExecutor(THREADS) as pool:
        there = hostile.Listener(os.getpid(), *door.getsockname())
        leader = pool.submit(meet_followers, door, "p0", 2, SECRET, GEOMETRY, lost.append)
        drawn = hostile.Hostile(1, tmp_path / "trap", b"")
        for _ in range(FRAMES // 4):
            hostile.send(there, drawn.draw(), False)
        channel = meet_leader(str(Address("", there.host, there.port)), "p0", 1, SECRET, GEOMETRY)
        followers = leader.result(10)
    with contextlib.closing(channel), contextlib.closing(followers):
        channel.say(orders.Here("the same"))
        followers.together("the same")
    for each in (channel, *followers.channels):
        each._socket.close()  # a lane's process ends with its channels
    assert not lost and not (tmp_path / "trap").exists()


@pytest.mark.slow
def test_ten_thousand_frames_to_each_port_harm_nobody(cluster, tmp_path, monkeypatch):
    """Costs a quarter of a minute on two free cores."""
    monkeypatch.setattr("tests.faults.test_frames.FRAMES", 10_000)
    test_frames_of_strangers_harm_nobody(cluster, tmp_path)
