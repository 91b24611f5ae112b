"""A second Python is found by running it, and its environment is made whole or not at all."""

import sys

import pytest

from tests.pallas_kernels import second_python
from tests.pallas_kernels.second_python import Kind, candidates, environment, home, run, runs

KIND = Kind("9.9.9", ("one",), ("two",))


def script(path, words):
    path.write_text(f"#!/bin/sh\n{words}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    "words, expected",
    [
        ("echo 3 12 /bin/python", True),
        ("echo 3 14 /bin/python", True),
        ("echo 3 11 /bin/python", False),
        ("echo 3 15 /bin/python", False),
        ("echo 2 7 /bin/python", False),
        ("echo 'pyenv: python3.12: command not found' >&2; exit 127", False),
        ("echo 3 12 /bin/python; exit 1", False),
        ("echo The command exists in these Python versions", False),
        ("exit 0", False),
    ],
)
def test_a_candidate_is_judged_by_what_it_does(tmp_path, words, expected):
    assert runs(script(tmp_path / "python", words)) is expected


def test_what_is_no_program_is_no_python(tmp_path):
    (tmp_path / "python").write_text("words")
    assert not runs(str(tmp_path / "python")) and not runs(str(tmp_path / "nothing"))


def test_the_python_that_runs_the_tests_is_tried_first():
    assert next(iter(candidates())) == sys.executable


def test_without_a_package_index_the_test_is_skipped_by_name(monkeypatch, tmp_path):
    monkeypatch.setenv("SERAC_TEST_CACHE", str(tmp_path))
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="jax 9.9.9 .* runs where CI=true"):
        environment(sys.executable, KIND)


def test_an_environment_is_made_once(monkeypatch, tmp_path):
    monkeypatch.setenv("SERAC_TEST_CACHE", str(tmp_path))
    monkeypatch.setenv("CI", "true")
    commands = []
    monkeypatch.setattr(
        second_python, "run", lambda *words: (home("base", KIND).mkdir(exist_ok=True), commands.append(words))
    )
    python = environment("base", KIND)
    assert [words[-1] for words in commands] == [str(home("base", KIND)), "one", "two"]
    assert "--no-deps" in commands[2] and python.endswith("/bin/python")
    monkeypatch.delenv("CI")
    assert environment("base", KIND) == python and len(commands) == 3


def test_an_environment_that_failed_is_not_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("SERAC_TEST_CACHE", str(tmp_path))
    monkeypatch.setenv("CI", "true")
    with pytest.raises(RuntimeError, match="no such base"):
        environment(script(tmp_path / "python", "echo no such base >&2; exit 1"), KIND)
    assert not (home("base", KIND) / "ready").exists()


def test_environments_of_other_pins_and_pythons_are_apart():
    other = KIND._replace(alone=("three",))
    assert len({home(base, kind) for base in ("a", "b") for kind in (KIND, other)}) == 4


def test_what_a_command_said_is_told():
    with pytest.raises(RuntimeError, match="words of the command"):
        run("sh", "-c", "echo words of the command >&2; exit 1")
