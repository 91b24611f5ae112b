"""`serac doctor` on this machine: real examiners at the ends of pipes, ports that are taken, hosts that are silent.

What needs JAX is slow-marked; over ssh and network namespaces it is tested in tests/hosts.
"""

import json
import os
import socket
import subprocess
import sys
import time

import pytest

from engine import cli
from engine.cluster import asked, doctor, examined, facts
from engine.cluster.examined import Examined, Silent
from engine.cluster.topology import Host, Security
from engine.config import Settings

ELSEWHERE = "192.0.2.1"  # documentation's; the ssh of these tests never connects


@pytest.fixture
def examiner():
    with_pipe = Examined(Host("h0", "127.0.0.1"), Security())
    yield with_pipe
    with_pipe.close()


def look(what):
    """All findings, and the exit code."""
    found = []
    code, _ = doctor.run(what, found.extend)
    return found, code


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def settings(**given):
    return Settings(port=free_port(), admin_port=free_port(), **given)


@pytest.fixture
def ssh(tmp_path, monkeypatch):
    """Puts a shell script in the place of ssh."""

    def be(script):
        (tmp_path / "ssh").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "ssh").chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    return be


def test_an_examiner_answers_one_question_after_the_other(examiner):
    told = examiner.facts({"ask": "facts", "address": "127.0.0.1", "cache": "", "ports": {}}, 5)
    assert told.versions["python"] == ".".join(map(str, sys.version_info[:2]))
    assert told.memory_free > 0 and told.interface == "lo" and abs(told.clock_ratio - 1) < 0.05
    ahead, unsure = doctor.skew(examiner)
    assert abs(ahead) <= unsure + 0.001 and unsure < 1


def test_an_examiner_listens_and_reaches_and_says_what_it_cannot(examiner):
    port = examiner.ask({"ask": "listen", "address": "127.0.0.1", "port": 0}, 5)["port"]
    where = {"open": ["127.0.0.1", port], "shut": ["127.0.0.1", free_port()]}
    reached = examiner.ask({"ask": "reach", "addresses": where}, 5)["reached"]
    assert reached["open"] < 1 and reached["shut"] is None
    assert "problem" in examiner.ask({"ask": "listen", "address": ELSEWHERE, "port": 0}, 5)


@pytest.mark.parametrize("after_s", [0.0, 0.6], ids=["at once", "while its child runs"])
def test_an_examiner_ends_with_its_input(examiner, after_s):
    alone = {
        "model": "embedded",
        "coordinator": "127.0.0.1:9",
        "bind": None,
        "rank": 1,
        "processes": 2,
        "devices": [],
    }
    examiner._send({"ask": "allreduce", "environment": {}, "words": alone})
    time.sleep(after_s)
    began = time.monotonic()
    examiner.close()
    assert examiner._process.returncode == 0 and time.monotonic() - began < examined.END_S


def test_an_examiner_that_dies_is_silent_at_once(examiner):
    examiner._process.kill()
    with pytest.raises(Silent, match="ended with code -9"):
        examiner.ask({"ask": "clock"}, 5)


def test_two_processes_of_this_machine_are_well():
    found, code = look(asked.here(settings(), 2, jax=False))
    assert code == 0, found
    assert [each.words[:7] for each in found if each.what == "network"] == ["2 pairs"]
    what = {(each.host, each.what) for each in found}
    assert {("p0", "ports"), ("p1", "python"), ("all", "versions"), ("all", "clocks"), ("all", "network")} <= what


def test_a_port_that_somebody_has_is_named_by_its_setting():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        found, code = look(asked.here(Settings(port=port, admin_port=free_port()), 1, jax=False))
    (ports,) = [each for each in found if each.what == "ports"]
    assert code == 2 and ports.level == "fail" and ports.words == f"taken: port {port}"


def test_a_host_that_says_nothing_is_named_in_time_and_the_others_are_looked_at(ssh, monkeypatch):
    ssh("exec sleep 60")
    monkeypatch.setattr(doctor, "ANSWER_S", 2.0)
    hosts = [Host("h0", "127.0.0.1", (0,)), Host("h1", ELSEWHERE, (0,))]
    began = time.monotonic()
    times = []
    code, rows = doctor.run(asked.Asked(hosts, settings(device="cpu")),
                            lambda some: times.extend((time.monotonic(), each) for each in some))  # fmt: skip
    at, silent = next((at, each) for at, each in times if each.what == "host")
    assert silent.host == "h1" and "no answer within" in silent.words and silent.todo
    assert at - began < 8 and code == 69 and rows == []
    assert ("h0", "python") in {(each.host, each.what) for _, each in times}


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("echo 'Host key verification failed.' >&2; exit 255", "known"),
        ("echo 'root@host: Permission denied (publickey).' >&2; exit 255", "permission denied"),
        ("echo 'exec: python9: not found' >&2; exit 127", "no Serac of this version there"),
        ("echo 'Welcome to this host'; echo '{\"facts\": {}}'; cat >/dev/null", "another version"),
    ],
)
def test_why_ssh_fails_is_said_without_addresses(ssh, script, words):
    ssh(script)
    found, code = look(asked.Asked([Host("h1", ELSEWHERE, (0,))], settings(device="cpu")))
    (silent,) = [each for each in found if each.what == "host"]
    assert words in silent.words and silent.todo and code == 69
    assert not any(ELSEWHERE in each.words + each.todo for each in found)


def test_jax_talks_between_hosts_only_where_a_lane_over_them_could():
    trusted = Security(trusted_network=True)

    def at(*addresses):
        return [Host(f"h{k}", address) for k, address in enumerate(addresses)]

    assert asked.unguarded(at("10.0.0.1", "10.0.0.2"), trusted) == ""
    assert "trusted" in asked.unguarded(at("10.0.0.1", "10.0.0.2"), Security())
    assert "h1 is not a private" in asked.unguarded(at("10.0.0.1", "8.8.8.8"), trusted)
    assert "h0 is not a private" in asked.unguarded(at("a.name", "10.0.0.1"), trusted)
    assert asked.unguarded(at("127.0.0.1", "127.0.0.1"), Security()) == ""
    assert asked.unguarded(at("8.8.8.8"), Security()) == "", "one process talks with nobody"


def test_a_cache_that_others_may_enter_is_told(tmp_path):
    assert facts.cache_problem(tmp_path / "new" / "deeper") == ""
    (tmp_path / "open").mkdir(mode=0o755)
    assert "0755" in facts.cache_problem(tmp_path / "open")
    (tmp_path / "open").chmod(0o700)
    assert facts.cache_problem(tmp_path / "open") == ""
    (tmp_path / "file").touch()
    assert "cannot be written" in facts.cache_problem(tmp_path / "file")


def test_the_command_prints_a_line_a_check_or_one_object(capsys):
    ports = ["--port", str(free_port()), "--admin-port", str(free_port())]
    assert cli.main(["doctor", "--quick", *ports]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:4] == ["ok", "this", "machine", "python"] and lines[-1].endswith("0 failed")
    assert cli.main(["doctor", "--quick", "--json", *ports]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["exit"] == 0 and {"level", "host", "what", "words", "todo"} == told["findings"][0].keys()


def test_settings_beside_a_file_of_hosts_are_refused(tmp_path, capsys):
    assert cli.main(["doctor", "--hosts", str(tmp_path / "x.toml"), "--port", "1"]) == 2
    assert "port: got it beside --hosts" in capsys.readouterr().err


def test_what_gpus_have_free_is_what_nvidia_smi_says(tmp_path, monkeypatch):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho '70000, 140000, 580.1'\necho '140000, 140000, 580.1'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert facts.gpus() == ([0.5, 1.0], "580.1")
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'\n")
    assert facts.gpus() == ([], "")


@pytest.mark.slow
def test_a_process_that_fails_ends_the_allreduce_of_all_and_is_named(monkeypatch):
    """Costs 6 s: nobody waits for it until a heartbeat is missed."""
    child = doctor.Round._child

    def spoilt(self, rank, host, coordinator):
        words = child(self, rank, host, coordinator)
        return {**words, "environment": {"JAX_PLATFORMS": "none_such"}} if rank == 1 else words

    monkeypatch.setattr(doctor.Round, "_child", spoilt)
    began = time.monotonic()
    found, code = look(asked.here(settings(device="cpu"), 3, jax=True))
    (one,) = [each for each in found if each.what == "allreduce"]
    assert (one.level, one.host, code) == ("fail", "p1", 69) and "none_such" in one.words
    assert time.monotonic() - began < 20


@pytest.mark.slow
def test_an_allreduce_over_two_processes_makes_a_table():
    """Costs 8 s."""
    command = [sys.executable, "-m", "engine.cli", "doctor", "--processes", "2", "--port", "0", "--admin-port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout
    assert "2 processes add up right" in done.stdout and "64 MiB" in done.stdout


@pytest.mark.slow
def test_a_model_that_is_not_there_is_told_by_what_would_load_it():
    """Costs 4 s."""
    found, code = look(asked.here(settings(model="/nonexistent", device="cpu"), 1, jax=True))
    (model,) = [each for each in found if each.what == "model"]
    assert code == 2 and model.level == "fail" and model.todo
