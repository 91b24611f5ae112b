"""Over a real sshd on hosts of namespaces: what they have, which of them does not fit, and a process on each."""

import json
import shutil
import stat
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from engine.cluster import ssh
from engine.cluster.found import Found
from engine.cluster.topology import FrontPlace, Host, Security, Topology
from engine.errors import ConfigError, Misfit, Unavailable
from engine.lanes import LaneSpec
from tests.hosts import namespaces, sshd
from tests.hosts.namespaces import Hosts
from tests.hosts.sshd import Sshd

REASON = namespaces.why_not() or sshd.why_not()
pytestmark = pytest.mark.skipif(bool(REASON), reason=REASON)
ROOT = Path(__file__).parents[3]
PYTHON = f"""\
#!/bin/sh
cd {ROOT} && exec {sys.executable} "$@"
"""
TOY = """\
#!{python}
import json, os, sys
print(json.dumps({{"arguments": sys.argv[1:], "environment": dict(os.environ)}}), flush=True)
for line in sys.stdin:
    print(json.dumps({{"heard": json.loads(line)}}), flush=True)
print(json.dumps({{"event": "over"}}), flush=True)
"""


def script(path: Path, text: str) -> str:
    path.write_text(text)
    path.chmod(stat.S_IRWXU)
    return str(path)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Two hosts with an sshd each, and the topology of a lane over both."""
    folder = tmp_path_factory.mktemp("ssh")
    apart = folder / "with a space"
    apart.mkdir()
    with Hosts(2) as hosts, Sshd(hosts[0], folder) as first, Sshd(hosts[1], folder) as second:
        known = apart / "known"
        known.write_text(first.known_hosts.read_text() + second.known_hosts.read_text())
        python = script(folder / "python", PYTHON)
        made = tuple(
            Host(
                f"h{k}",
                each.host.address,
                (0, 1),
                user="root",
                port=each.port,
                key=shutil.copy(each.key, apart / f"key{k}"),
                python=python,
            )
            for k, each in enumerate((first, second))
        )
        security = Security(certs=Path("/c"), known_hosts=known, trusted_network=True)
        lanes = (LaneSpec("b0", "both", 4, ("h1", "h0")),)
        front = FrontPlace(address=f"{first.host.address}:1")
        yield hosts, folder, Topology(made, lanes, front=front, security=security, serve={"device": "cpu"})


def changed(topology: Topology, **fields) -> Topology:
    """With another second host."""
    return replace(topology, hosts=(topology.hosts[0], replace(topology.hosts[1], **fields)))


def test_every_host_says_what_it_has(world):
    _, _, topology = world
    found = ssh.find(topology)
    assert list(found) == ["h0", "h1"]
    assert {each.interface for each in found.values()} == {"eth0"}
    assert all(each.versions["jax"] and each.versions["jaxlib"] for each in found.values())


@pytest.mark.slow
def test_a_host_that_is_not_there_is_named_within_10_s(world):
    """Costs 5 s, the time that ssh waits for an answer."""
    hosts, _, topology = world
    hosts[1].down()
    began = time.monotonic()
    try:
        with pytest.raises(Unavailable, match="^host h1: no .*is it up, and may this machine reach it") as caught:
            ssh.find(topology)
    finally:
        hosts.heal()
    assert time.monotonic() - began < 10 and caught.value.exit_code == 69


@pytest.mark.slow
def test_a_host_that_does_not_fit_is_named_with_what_to_do(world, monkeypatch, tmp_path):
    """Costs 5 s: a handful of connections."""
    _, folder, topology = world
    (tmp_path / "nobody").write_text("")
    sshd.keys(tmp_path, "other")
    rows = [
        (changed(topology, port=2223), "host h1: connection refused; does its sshd run, at this port?"),
        (
            changed(topology, key=tmp_path / "other"),
            "host h1: permission denied; its sshd must take a key that needs",
        ),
        (
            changed(topology, python="/none/python"),
            "host h1: '/none/python' there has no Serac of this version (exit",
        ),
        (changed(topology, python="true"), "host h1: 'true' there has no Serac of this version (exit code 0)"),
        (
            replace(topology, security=replace(topology.security, known_hosts=tmp_path / "nobody")),
            "host h0: its key is not the known one; add it to the known hosts",
        ),
    ]
    for made, words in rows:
        with pytest.raises((ConfigError, Unavailable)) as caught:
            ssh.find(made)
        assert str(caught.value).startswith(words)
    monkeypatch.setattr(ssh, "here", lambda: Found(versions={"jax": "9.9"}))
    with pytest.raises(Misfit, match=r"host h0: versions differ: jax [\d.]+ there, 9.9 here") as caught:
        ssh.find(topology)
    assert caught.value.exit_code == 78


def test_a_process_runs_on_its_host_with_its_words_and_ends_with_its_input(world):
    hosts, folder, topology = world
    topology = changed(topology, python=script(folder / "a 'toy'; $(x)", TOY.format(python=sys.executable)))
    made = ssh.commands(topology, dict.fromkeys(("h0", "h1"), Found()), {"LANG": "C", "HF_TOKEN": "t"})
    command = made["b0", 0]
    with subprocess.Popen(command.arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        said = json.loads(process.stdout.readline())
        assert said["arguments"][:3] == ["-m", "engine.cli", "worker"]
        assert {"--rank=0", "--processes=2", "--devices=0,1"} <= set(said["arguments"])
        there = said["environment"]
        assert there["XLA_FLAGS"] == "--xla_force_host_platform_device_count=2" and there["LANG"] == "C"
        assert "HF_TOKEN" not in there and "SSH_AUTH_SOCK" not in there and "DISPLAY" not in there
        process.stdin.write('{"start": {"epoch": 1}}\n')
        process.stdin.flush()
        assert json.loads(process.stdout.readline()) == {"heard": {"start": {"epoch": 1}}}
        process.stdin.close()
        assert json.loads(process.stdout.readline()) == {"event": "over"}
        assert process.wait(5) == 0


def test_a_process_ends_when_its_ssh_is_killed(world):
    hosts, folder, topology = world
    topology = changed(topology, python=script(folder / "toy", TOY.format(python=sys.executable)))
    made = ssh.commands(topology, dict.fromkeys(("h0", "h1"), Found()), {})
    before = set(hosts[1].pids())
    with subprocess.Popen(made["b0", 0].arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        assert set(hosts[1].pids()) - before
        process.kill()
    until = time.monotonic() + 5
    while set(hosts[1].pids()) - before and time.monotonic() < until:
        time.sleep(0.01)
    assert not set(hosts[1].pids()) - before
