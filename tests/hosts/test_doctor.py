"""`serac doctor --hosts` over a real sshd: hosts that are well, one that is gone, one that another cannot reach.

Costs 20 s: each well visit imports JAX on every host.
"""

import json
import os
import subprocess
import sys
import time
from contextlib import ExitStack

import pytest

from tests.hosts import namespaces, sshd
from tests.hosts.namespaces import Hosts
from tests.hosts.sshd import Sshd

pytestmark = pytest.mark.slow
COUNT = 3


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The hosts, and the file that names them."""
    if reason := namespaces.why_not() or sshd.why_not():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("doctor")
    python = sshd.python(folder)
    with Hosts(COUNT) as hosts, ExitStack() as stack:
        servers = [stack.enter_context(Sshd(host, folder)) for host in hosts]
        (folder / "known").write_text("".join(server.known_hosts.read_text() for server in servers))
        tables = ["[serve]", 'model = "embedded"', 'device = "cpu"', "[security]", "trusted_network = true"]
        tables += [
            f'known_hosts = "{folder}/known"',
            f'certs = "{folder}/certs"',
            "[front]",
            f'address = "{hosts.address}:0"',
            "port = 0",
        ]
        tables += ["admin_port = 0", "[[lane]]", 'name = "b0"', 'role = "both"', 'mesh = "tp=3"']
        tables += [f"hosts = {json.dumps([host.name for host in hosts])}"]
        for host, server in zip(hosts, servers, strict=True):
            tables += ["[[host]]", f'name = "{host.name}"', f'address = "{host.address}"', "devices = 1"]
            tables += ['user = "root"', f"port = {server.port}", f'key = "{server.key}"', f'python = "{python}"']
        (folder / "cluster.toml").write_text("\n".join(tables) + "\n")
        yield hosts, folder / "cluster.toml"


@pytest.fixture(autouse=True)
def healed(made):
    yield
    made[0].heal()


def look(file, *flags):
    """What the doctor says, and when it said each line."""
    command = [sys.executable, "-m", "engine.cli", "doctor", "--hosts", str(file), *flags]
    began = time.monotonic()
    lines = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=dict(os.environ)) as process:
        for line in process.stdout:
            lines.append((time.monotonic() - began, line.rstrip()))
    print(*(f"{at:5.1f} s  {line}" for at, line in lines), sep="\n")
    return process.returncode, lines


def test_hosts_that_are_well_add_up_arrays_over_their_own_addresses(made):
    code, lines = look(made[1])
    text = "\n".join(line for _, line in lines)
    assert code == 0, text
    assert "3 processes add up right" in text and "64 MiB" in text
    words = [line.split() for _, line in lines]
    assert all(["ok", host.name, "interface", "eth0", "has", "its", "address"] in words for host in made[0])


def test_a_host_that_is_gone_is_named_within_10_s(made):
    made[0][1].down()
    code, lines = look(made[1], "--quick")
    at, line = next((at, line) for at, line in lines if " host " in line)
    assert code == 69 and line.startswith("fail") and " h1 " in line and at < 10, lines


def test_hosts_that_do_not_reach_each_other_are_named(made):
    hosts, file = made
    hosts[2].blackhole(hosts[0])
    code, lines = look(file, "--quick")
    text = "\n".join(line for _, line in lines)
    assert code == 69 and "does not reach h0" in text and "does not reach h2" in text and " h1  network" not in text
