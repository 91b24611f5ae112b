"""The hosts themselves: they talk, a cut stops them, healing lets them talk, and nothing is left over."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from tests.hosts.namespaces import Hosts, ip, leftovers, why_not

ECHO = """
import socket, threading
def answer(talk):
    for line in talk.makefile():
        talk.sendall(line.encode())
with socket.create_server(("0.0.0.0", 4000)) as listener:
    print("listening", flush=True)
    while True:
        threading.Thread(target=answer, args=listener.accept()[:1], daemon=True).start()
"""
ASK = """
import socket, sys
with socket.create_connection((sys.argv[1], 4000), timeout=float(sys.argv[2])) as talk:
    words = talk.makefile()
    for line in sys.stdin:
        talk.sendall(line.encode())
        try:
            print(words.readline().strip(), flush=True)
        except TimeoutError:
            print("silence", flush=True)
            break
"""


@pytest.fixture(scope="module", autouse=True)
def here():
    """Skips where there can be no hosts."""
    if reason := why_not():
        pytest.skip(reason)


@pytest.fixture
def hosts():
    with Hosts(2) as made:
        yield made


@pytest.fixture
def echo(hosts):
    server = hosts[1].popen([sys.executable, "-c", ECHO], stdout=subprocess.PIPE)
    assert server.stdout.readline() == "listening\n"
    yield server
    server.kill()
    server.wait()
    server.stdout.close()


PATIENT_S, SHORT_S = 10, 0.4  # where an answer is due, where none is


def ask(hosts, seconds=PATIENT_S):
    """What h0 hears from h1, or how it fails."""
    done = hosts[0].run([sys.executable, "-c", ASK, "h1", seconds], input="hello\n", timeout=30)
    return done.stdout.strip() or done.stderr.strip().splitlines()[-1]


def test_two_hosts_talk_by_name_and_a_pulled_cable_stops_them_until_it_is_back(hosts, echo):
    assert ask(hosts) == "hello"
    hosts[1].down()
    assert "Error" in ask(hosts, SHORT_S)
    hosts[1].up()
    assert ask(hosts) == "hello"


def test_a_blackhole_swallows_one_direction_of_an_open_connection(hosts, echo):
    asker = hosts[0].popen([sys.executable, "-c", ASK, "h1", 1], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with asker:
        print("before", file=asker.stdin, flush=True)
        assert asker.stdout.readline() == "before\n"
        hosts[1].blackhole(hosts[0])
        print("while", file=asker.stdin, flush=True)
        assert asker.stdout.readline() == "silence\n"
        asker.stdin.close()
    assert echo.poll() is None, "neither side was told"
    hosts.heal()
    assert ask(hosts) == "hello"


def test_a_host_has_its_own_name_address_loopback_and_shared_memory(hosts):
    script = textwrap.dedent("""
        import os, pathlib, socket
        pathlib.Path("/dev/shm/mine").touch()
        print(socket.gethostname(), socket.gethostbyname(socket.gethostname()), os.listdir("/dev/shm"))
        socket.create_server(("127.0.0.1", 4001)).close()
    """)
    for host in hosts:
        assert host.run([sys.executable, "-c", script]).stdout == f"{host.name} {host.address} ['mine']\n"
    assert not os.path.exists("/dev/shm/mine")


def test_this_machine_and_the_hosts_reach_each_other(hosts, echo):
    done = subprocess.run(
        [sys.executable, "-c", ASK, hosts[1].address, "10"], input="x\n", capture_output=True, text=True
    )
    assert done.stdout == "x\n"


def test_all_processes_of_a_host_are_stopped_and_killed_at_once(hosts, echo):
    hosts[1].signal(signal.SIGSTOP)
    assert ask(hosts, SHORT_S) == "silence"
    hosts[1].signal(signal.SIGCONT)
    hosts[1].signal(signal.SIGKILL)
    assert echo.wait(5) == -signal.SIGKILL and not hosts[1].pids()


def names(subnet):
    """What a subnet has on this machine."""
    links = [line for line in ip("-o", "link").splitlines() if f" sr{subnet}" in line]
    return [*links, *leftovers(subnet)]


def test_nothing_is_left_after_a_failing_test():
    with pytest.raises(ZeroDivisionError), Hosts(2) as hosts:
        sleeper = hosts[0].popen(["sleep", "60"])
        assert names(hosts.subnet)
        raise ZeroDivisionError
    assert not names(hosts.subnet) and sleeper.wait(1) == -signal.SIGKILL


def test_what_a_killed_run_left_is_removed_by_the_next():
    script = "import time\nfrom tests.hosts.namespaces import Hosts\n"
    script += "with Hosts(2) as hosts:\n    hosts[0].popen(['sleep', '60'])\n    print(hosts.subnet, flush=True)\n"
    script += "    time.sleep(60)\n"
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as run:
        subnet = int(run.stdout.readline())
        run.kill()
    assert leftovers(subnet) == [0, 1]
    for _ in range(50):  # until the keepers have gone too
        with Hosts(1) as hosts:
            if hosts.subnet == subnet:
                break
        time.sleep(0.1)
    assert hosts.subnet == subnet and not names(subnet)
