"""Logs of processes: a file each, lines of JSON alone, rotated, nobody else's to read."""

import json
import stat

import pytest

from engine.cluster import rank_logs
from engine.cluster.rank_logs import RankLogs
from engine.errors import ConfigError


@pytest.fixture
def logs(tmp_path):
    made = RankLogs(tmp_path / "logs")
    yield made
    made.close()


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_process_has_a_file_of_what_it_said(logs, tmp_path):
    logs.event("p0", 0, {"event": "hello", "rank": 0})
    logs.of("p0", 1)("Killed")
    logs.of("p0", 1)('{"level": "info", "message": "left"}')
    first, second = (lines(tmp_path / "logs" / f"p0-{rank}.jsonl") for rank in (0, 1))
    assert [each["event"] for each in first] == ["hello"]
    assert second[0]["said"] == "Killed" and second[1] == {"level": "info", "message": "left"}


def test_progress_is_not_kept(logs, tmp_path):
    logs.event("p0", 0, {"event": "stage", "stage": "load", "done": 1, "of": 2})
    assert list((tmp_path / "logs").iterdir()) == []


def test_a_full_file_moves_aside_and_the_oldest_goes(logs, tmp_path, monkeypatch):
    monkeypatch.setattr(rank_logs, "MOST_BYTES", 200)
    for number in range(100):
        logs.of("d0", 0)(json.dumps({"number": number, "filler": "x" * 40}))
    found = sorted(path.name for path in (tmp_path / "logs").iterdir())
    assert found == ["d0-0.jsonl", "d0-0.jsonl.1", "d0-0.jsonl.2", "d0-0.jsonl.3"]
    assert all((tmp_path / "logs" / name).stat().st_size <= 200 for name in found)
    assert lines(tmp_path / "logs" / "d0-0.jsonl")[-1]["number"] == 99


def test_the_files_are_their_owners_alone(logs, tmp_path, monkeypatch):
    monkeypatch.setattr(rank_logs, "MOST_BYTES", 50)
    for number in range(9):
        logs.of("d0", 0)(json.dumps({"number": number, "filler": "x" * 9}))
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "logs").iterdir()}
    assert modes == {0o600} and stat.S_IMODE((tmp_path / "logs").stat().st_mode) == 0o700


def test_without_a_folder_nothing_is_written(tmp_path):
    RankLogs(None).of("p0", 0)("words")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"^log_dir: got '.*; expected a folder to write in \(Not a dir"):
        RankLogs(tmp_path / "file" / "logs")
