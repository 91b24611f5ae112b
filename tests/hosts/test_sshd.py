"""The real sshd of the harness: who is let in, and what becomes of a remote process when its channel is cut.

What these show for whoever starts processes over ssh: sshd never signals a command that has no terminal. It goes on
when its client dies, and learns of it only by the end of its input, 10 ms later; when the network goes silent it
learns nothing at all. So a remote group must watch its own input, for its end and for silence.
"""

import signal
import subprocess
import time

import pytest

from tests.hosts import namespaces, sshd
from tests.hosts.namespaces import Hosts
from tests.hosts.sshd import Sshd

SILENT_S = 1
WATCHED = f"sleep 97 & sleep 98 & while read -t {SILENT_S} line; do :; done; kill -9 0"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    if reason := namespaces.why_not() or sshd.why_not():
        pytest.skip(reason)
    with Hosts(2) as hosts, Sshd(hosts[1], tmp_path_factory.mktemp("sshd")) as server:
        yield hosts, server


@pytest.fixture
def remote(made):
    """Starts a command over ssh and waits until its children run; ends what is left of it."""
    hosts, server = made
    before = set(hosts[1].pids())
    clients = []

    def start(command):
        client = hosts[0].popen(["ssh", *server.options, "h1", command], stdin=subprocess.PIPE)
        clients.append(client)
        print("first", file=client.stdin, flush=True)
        assert within(20, lambda: sleepers(hosts[1])), "the command runs"
        return client

    yield start
    hosts.heal()
    for client in clients:
        client.kill()
        client.wait()
        client.stdin.close()
    for pid in set(hosts[1].pids()) - before:
        subprocess.run(["kill", "-9", str(pid)], stderr=subprocess.DEVNULL)


def sleepers(host):
    """Processes of a host that sleep for their whole life."""
    found = subprocess.run(["ps", "-o", "pid=,comm=", "-p", ",".join(map(str, host.pids()))],
                           capture_output=True, text=True)  # fmt: skip
    return [line for line in found.stdout.splitlines() if line.endswith("sleep")]


def within(seconds, what):
    until = time.monotonic() + seconds
    while not what():
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    return True


def test_a_command_runs_there_and_nobody_is_asked(made):
    hosts, server = made
    done = hosts[0].run(["ssh", *server.options, "h1", "hostname; exit 3"])
    assert (done.stdout, done.returncode) == ("h1\n", 3)


def test_a_host_whose_key_is_not_known_is_refused(made):
    hosts, server = made
    done = hosts[0].run(["ssh", "-o", "UserKnownHostsFile=/dev/null", *server.options, "h1", "true"])
    assert done.returncode == 255 and "Host key verification failed" in done.stderr


def test_a_client_whose_key_is_not_listed_is_refused(made, tmp_path):
    hosts, server = made
    sshd.keys(tmp_path, "other")
    stranger = server.client.read_text().replace(str(server.key), str(tmp_path / "other"))
    (tmp_path / "client").write_text(stranger)
    done = hosts[0].run(["ssh", "-F", tmp_path / "client", "h1", "true"])
    assert done.returncode == 255 and "Permission denied (publickey)" in done.stderr


def test_a_process_that_watches_nothing_outlives_its_client(made, remote):
    remote("sleep 97").kill()
    assert not within(0.5, lambda: not sleepers(made[0][1]))


def test_a_group_that_watches_its_input_dies_with_its_client(made, remote):
    client = remote(WATCHED.replace(f"-t {SILENT_S} ", ""))
    client.send_signal(signal.SIGKILL)
    assert within(10, lambda: not sleepers(made[0][1]))


def test_a_group_that_expects_a_line_now_and_then_dies_when_the_network_is_cut(made, remote):
    hosts, _ = made
    client = remote(WATCHED)
    for _ in range(6):
        time.sleep(0.2)
        print("on", file=client.stdin, flush=True)
    assert len(sleepers(hosts[1])) == 2
    hosts[0].blackhole(hosts[1])
    assert within(SILENT_S + 10, lambda: not sleepers(hosts[1]))
