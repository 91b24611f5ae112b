"""The command line: what it refuses, what it costs before it works, and what it hands on."""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from engine import cli, config
from engine.config import settle
from engine.options import Parser, add_settings, read_settings

ROOT = Path(cli.__file__).parents[1]


def refused(capsys, *arguments: str) -> str:
    assert cli.main(arguments) == 2
    streams = capsys.readouterr()
    assert streams.out == "" and streams.err.startswith("serac: error: ") and streams.err.count("\n") == 1
    return streams.err.removeprefix("serac: error: ").rstrip()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["srve"], "srve: unknown command; did you mean serve?"),
        (["frobnicate"], "frobnicate: unknown command; see serac --help"),
        (["serve", "--prot", "1"], "--prot: unknown option; did you mean --port?"),
        (["serve", "--tensor-paralel=2"], "--tensor-paralel: unknown option"),
        (["serve", "--max-num-seq", "2"], "--max-num-seq: unknown option; did you mean --max-num-seqs?"),
        (["serve", "--port", "1", "--port", "2"], "--port: got it twice; expected it once"),
        (["serve", "--mesh"], "--mesh: expected one argument"),
        (["serve", "one", "two"], "two: unknown argument"),
        (["serve", "--block-size", "17"], "--block-size: got '17'; expected one of 16, 32, 64, 128 positions"),
        (["serve", "--config", "/none.toml"], "--config: got /none.toml; expected a readable file"),
        (["generate"], "the following arguments are required: PROMPT"),
        (["generate", "x", "--temprature", "1"], "--temprature: unknown option; did you mean --temperature?"),
        (["generate", "x", "--max-tokens", "many"], "--max-tokens: got 'many'; expected an integer"),
        (["generate", "x", "--timeout", "5 minutes"], "--timeout: got '5 minutes'; expected a duration"),
        (["chat", "x"], "x: unknown argument"),
        (["version", "--long"], "--long: unknown option"),
    ],
)
def test_a_mistake_is_answered_in_one_line_with_exit_code_2(capsys, arguments, words):
    assert refused(capsys, *arguments).startswith(words)


def test_no_arguments_shows_the_usage_and_is_no_success(capsys):
    assert cli.main([]) == 2
    usage = capsys.readouterr().out
    assert cli.main(["--help"]) == 0
    assert capsys.readouterr().out == usage
    assert all(f"  {verb.name} " in usage for verb in cli.VERBS)


def test_every_setting_is_a_flag_of_serve_and_a_variable(capsys, monkeypatch, tmp_path):
    parser = Parser(prog="serac serve")
    add_settings(parser)
    assert {row.flag for row in config.ROWS.values()} - set(parser.known) == {"--model"}
    file = tmp_path / "serac.toml"
    file.write_text("port = 5\nadmin_port = 6\n")
    monkeypatch.setenv("SERAC_CONFIG", str(file))
    monkeypatch.setenv("SERAC_ADMIN_PORT", "7")
    settings = read_settings(parser.read(["folder", "--drain", "5m", "--insecure-allow-remote"]))
    assert (settings.model, settings.port, settings.admin_port, settings.drain) == ("folder", 5, 7, 300.0)
    assert settings.insecure_allow_remote is True
    monkeypatch.delenv("SERAC_CONFIG")
    monkeypatch.delenv("SERAC_ADMIN_PORT")
    assert read_settings(parser.read([])) == settle({}, {})


def test_an_interrupt_and_a_reader_that_left_are_quiet(monkeypatch, capsys):
    def interrupted(options):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "VERBS", (cli.Verb("version", "", lambda parser: None, interrupted),))
    assert cli.main(["version"]) == 130
    assert capsys.readouterr() == ("", "")
    command = f"{sys.executable} -m engine.cli --help | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("verb", [[], *([verb.name] for verb in cli.VERBS if verb.name not in ("bench", "plan"))])
def test_help_never_loads_jax_or_grpc(verb):
    program = f"""
import sys
from engine import cli
try:
    cli.main({verb!r} + ["--help"])
except SystemExit as left:
    assert left.code == 0
heavy = {{"jax", "grpc", "numpy", "google", "tokenizers"}} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "usage: serac" in done.stdout, done.stderr


def test_a_process_is_started_anew_with_what_jax_must_find(monkeypatch, capsys):
    started = []
    monkeypatch.setattr(os, "execve", lambda *arguments: started.append(arguments))
    monkeypatch.delenv("XLA_FLAGS")
    monkeypatch.delenv("JAX_PLATFORMS")
    cli.start_anew(settle({"device": "cpu", "mesh": "dp=2,tp=4"}, {}))
    program, arguments, environment = started[0]
    assert program == sys.executable and arguments[0] == sys.executable and arguments[1:] == sys.orig_argv[1:]
    assert environment["JAX_PLATFORMS"] == "cpu"
    assert environment["XLA_FLAGS"] == "--xla_force_host_platform_device_count=8"
    assert "JAX_PLATFORMS=cpu" in capsys.readouterr().err and "XLA_FLAGS" not in os.environ
    monkeypatch.setenv("XLA_FLAGS", environment["XLA_FLAGS"])
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    cli.start_anew(settle({"device": "cpu", "mesh": "dp=2,tp=4"}, {}))
    assert len(started) == 1


def test_version_names_what_matters(capsys):
    assert cli.main(["version"]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert names == [*cli.VERSIONS, "python"]


def test_the_command_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"]["serac"] == "engine.cli:main"


def test_plan_takes_the_name_of_a_device_that_is_not_here(capsys):
    assert cli.main(["plan", "embedded", "--mesh", "tp=4", "--device", "h200", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)
    assert cli.main(["plan", "embedded", "--device", "h20x"]) == 2
    assert "did you mean h20" in capsys.readouterr().err
