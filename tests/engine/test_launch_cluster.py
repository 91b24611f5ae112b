"""`serac launch`: what it says it would do, what it writes, and whom it becomes."""

import io
import json
import os
import shlex
import stat
import sys

import pytest
import yaml

from engine import cli, launch_cluster
from engine.errors import ConfigError

FILE = """\
[[host]]
name = "h0"
address = "10.0.0.1"
devices = 2
[[host]]
name = "h1"
address = "10.0.0.2"
devices = 2
[[lane]]
name = "p0"
role = "prefill"
mesh = 2
hosts = ["h1", "h0"]
[[lane]]
name = "d1"
role = "decode"
mesh = 1
hosts = ["h1"]
[front]
address = "10.0.0.1:50053"
[security]
certs = "/etc/serac/certs"
secret_file = "/etc/serac/secret/secret"
trusted_network = true
[serve]
device = "cpu"
"""
HERE = """\
[[host]]
name = "here"
address = "127.0.0.1"
devices = 3
[[lane]]
name = "b0"
role = "both"
mesh = 2
hosts = ["here", "here"]
[serve]
device = "cpu"
"""


class Screen(io.StringIO):
    """A terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def launch(tmp_path, capsys):
    """Runs the verb on a file: what it printed."""

    def run(text, *words):
        file = tmp_path / "cluster.toml"
        file.write_text(text)
        code = cli.main(["launch", str(file), *words])
        said = capsys.readouterr()
        assert code == 0, said.err
        return said.out

    return run


@pytest.mark.parametrize(
    ("text", "words", "over"),
    [
        (FILE, (), "ssh"),
        (HERE, (), "local"),
        (FILE, ("--over", "ray"), "ray"),
        (HERE, ("--over", "local"), "local"),
    ],
)
def test_a_dry_run_says_as_json_what_would_run_where(launch, text, words, over):
    said = json.loads(launch(text, "--dry-run", *words))
    assert (said["cluster"], said["over"]) == ("serac", over)
    wanted = [("here", "b0", 0, "0"), ("here", "b0", 1, "1")]
    if text == FILE:
        wanted = [("h1", "p0", 0, "0"), ("h0", "p0", 1, "0"), ("h1", "d1", 0, "1")]
    rows = said["processes"]
    assert [(row["host"], row["lane"], row["rank"], row["devices"]) for row in rows] == wanted
    assert all("engine.cli worker" in row["command"] for row in rows)
    assert ("-- 10.0.0.2 " in rows[0]["command"]) == (over == "ssh")
    assert ("node:10.0.0.2" in rows[0].get("placement", "")) == (over == "ray")


def test_a_person_sees_a_table(tmp_path, monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    (tmp_path / "x.toml").write_text(HERE)
    options = cli.Parser()
    cli.add_launch(options)
    out = Screen()
    assert launch_cluster.run(options.read([str(tmp_path / "x.toml"), "--dry-run"]), "1", out) == 0
    said = out.getvalue()
    assert "serac over local" in said and "devices" in said
    last = said.splitlines()[-2:]
    assert last[0] == "# b0 rank 1 on here"
    words = shlex.split(last[1])
    assert words[:2] == ["JAX_PLATFORMS=cpu", "XLA_FLAGS=--xla_force_host_platform_device_count=1"]
    assert words[2:6] == [sys.executable, "-m", "engine.cli", "worker"], "whole, to be copied"


def test_a_dry_run_over_slurm_or_kubernetes_prints_what_would_be_handed_over(launch):
    assert launch(FILE, "--over", "slurm", "--dry-run").count("#!/bin/bash") == 3
    text = FILE.replace('address = "10.0.0.1"\n', "").replace('address = "10.0.0.2"\n', "")
    text = text.replace("10.0.0.1:50053", "0.0.0.0:50053").replace("[front]", '[front]\nhost = "0.0.0.0"')
    made = list(yaml.safe_load_all(launch(text, "--over", "kubernetes", "--image", "x:1", "--namespace", "n")))
    kinds = [each["kind"] for each in made]
    assert kinds.count("LeaderWorkerSet") == 2 and kinds.count("Deployment") == 1
    assert all(each["metadata"]["namespace"] == "n" for each in made)


def test_scripts_are_written_where_they_are_wanted(launch, tmp_path):
    said = launch(FILE, "--over", "slurm", "--dry-run", "--out", str(tmp_path / "jobs"), "--python", "/opt/python")
    paths = sorted((tmp_path / "jobs").iterdir())
    assert [path.name for path in paths] == ["serac-d1.sh", "serac-front.sh", "serac-p0.sh"]
    assert sorted(said.split()) == list(map(str, paths))
    for path in paths:
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0
        assert f"/opt/python -m engine.cli launch {tmp_path}/cluster.toml" in path.read_text()


def test_a_job_becomes_its_rank(launch, monkeypatch):
    became = []
    monkeypatch.setattr(os, "execvpe", lambda *words: became.append(words))
    for name, value in {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURMD_NODENAME": "h0"}.items():
        monkeypatch.setenv(name, value)
    said = json.loads(launch(FILE, "--lane", "p0", "--front", "10.0.0.9:1", "--dry-run"))
    assert not became and "--front=10.0.0.9:1" in said["processes"][0]["command"]
    launch(FILE, "--lane", "p0")
    program, arguments, environment = became[0]
    assert program == arguments[0] == sys.executable and "--rank=1" in arguments
    assert environment["XLA_FLAGS"].endswith("device_count=1")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--over", "slrm"), "invalid choice: 'slrm'"),
        (("--over", "local", "--dry-run"), "host h0 is another machine; expected ssh"),
        (("--lane", "p0"), "nothing says which rank of p0 this is"),
        (("--lane", "p0", "--rank", "x"), "--rank: got 'x'; expected an integer in 0..10000"),
        (("--lane", "p7", "--rank", "0"), "lane: got 'p7'; expected one of p0, d1"),
        (("--over", "slurm", "--dry-run", "--out", "/dev/null/x"), "out: got /dev/null/x; expected a folder"),
        (("--over", "kubernetes",), "host: got '127.0.0.1'; expected 0.0.0.0 in [front]"),
        (("--front-only", "--listen", "127.0.0.1:1"), "listen: address: got one of loopback, which h0"),
        (("--front-only", "--listen", "here"), "listen: address: got 'here'; expected HOST:PORT"),
        (("--lane-interface", "x"), "--lane-interface: unknown option"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(tmp_path, capsys, words, said):
    (tmp_path / "x.toml").write_text(FILE)
    assert cli.main(["launch", str(tmp_path / "x.toml"), *words]) == 2
    err = capsys.readouterr().err
    assert err.startswith("serac: error: ") and said in err and err.count("\n") == 1


def test_a_mistake_in_the_file_is_named_with_its_place(tmp_path, capsys):
    (tmp_path / "x.toml").write_text(FILE.replace("hosts", "host"))
    assert cli.main(["launch", str(tmp_path / "x.toml"), "--dry-run"]) == 2
    assert "x.toml:9:3: hosts: got none; expected it in each [[lane]]" in capsys.readouterr().err


def test_logs_of_all_processes_are_kept_where_the_flag_says_and_no_process_hears_of_it(tmp_path, monkeypatch):
    (tmp_path / "cluster.toml").write_text(HERE)
    heard, words = [], []

    def front(settings, topology, commands):
        words.extend(word for command in commands.values() for word in command.arguments)
        heard.append(settings.log_dir)
        raise ConfigError("enough")

    monkeypatch.setattr(launch_cluster.front, "Front", front)
    assert cli.main(["launch", str(tmp_path / "cluster.toml"), "--over=local", f"--log-dir={tmp_path}/logs"]) == 2
    assert heard == [tmp_path / "logs"] and words and not [word for word in words if word.startswith("--log-d")]
