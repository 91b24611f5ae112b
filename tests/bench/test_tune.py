import json
from collections import namedtuple
from unittest.mock import patch

import pytest

from bench import kernels_trial, tune
from bench.kernels_process import Job
from bench.tune import GAIN, GRIDS, Point, best, grid, points, written
from pallas_kernels import served, tuned
from pallas_kernels.dispatch import KERNELS
from pallas_kernels.target import CPU, H200
from pallas_kernels.xla import decode as xla_decode

CHIP = CPU._replace(kind="Some Chip")
DECODE = next(row for row in served.SERVED if row.name == "llama-8b decode 64")


class Kernel:
    """Serves decode on CPUs by the XLA path; wrong with 9 stages, refused with 5."""

    Config = namedtuple("Config", "stages resident fixed", defaults=(None,))

    @staticmethod
    def unserved(target, shape):
        return None if shape.head_width == 128 and shape.pool_dtype == "bfloat16" else "128 and bfloat16 alone"

    @staticmethod
    def attend(*arrays, target, config=None, **options):
        if config is not None and config.stages == 5:
            raise ValueError("5 stages do not fit shared memory")
        o, lse = xla_decode.attend(*arrays, platform="cpu", **options)
        return (o * 1.5 if config is not None and config.stages == 9 else o), lse


@pytest.fixture
def kernel():
    with patch.dict(KERNELS, {"decode": (("mosaic", Kernel),), "chunks": ()}):
        yield


def timer(case, by, memory_bytes, config):
    """The rule takes 100 us, and the more stages a config has the less it takes."""
    return 100e-6 if config is None else 100e-6 - 5e-6 * config.stages


def doing(tmp_path, asked):
    """What the processes do, in this one."""
    options = {"small": True, "memory_bytes": 1 << 30, "dump": str(tmp_path)}

    def do(jobs):
        rows = []
        for job in jobs:
            asked.append(job)
            try:
                row = kernels_trial.trial(job, options, timer)
            except ValueError as error:
                row = {"error": str(error)}
            rows.append({**job._asdict(), **row})
        return rows

    return do


def test_the_fastest_config_that_is_right_is_written_and_found_again(tmp_path, kernel, monkeypatch):
    """Costs the compilation of five small steps."""
    monkeypatch.setitem(GRIDS, ("decode", "mosaic"), {"stages": (2, 3, 5, 9), "resident": (1,)})
    every = points(CHIP, "llama-8b decode 64")
    assert [point.row.name for point in every] == ["llama-8b decode 64", *[p.row.name for p in every[1:]]]
    asked = []
    found = tune.tune(every[:1], doing(tmp_path, asked))
    assert found[0]["config"] == {"stages": 3, "resident": 1} and found[0]["us"] == pytest.approx(85)
    assert (found[0]["tried"], found[0]["timed"], found[0]["rule_us"]) == (5, 3, pytest.approx(100))
    assert json.loads(asked[-1].piece)["full"], "the winner is checked at full size"
    file = tmp_path / "some-chip.json"
    file.write_text(written(file, CHIP, every[:1], found, {"jax": "1", "driver": "2", "date": "3"}))
    tuned.entries.cache_clear()
    fields = Kernel.Config._fields
    look = {"kernel": "mosaic", "fields": fields, "folder": tmp_path}
    assert tuned.find(CHIP, "decode", every[0].shape, 64, **look) == {"stages": 3, "resident": 1}
    assert tuned.find(CHIP, "decode", every[0].shape, 65, **look) is None
    assert Kernel.Config(**tuned.find(CHIP, "decode", every[0].shape, 33, **look)).stages == 3


def point_and_rows(rule_us, *others):
    point = Point(DECODE, "decode", "mosaic")
    rows = [({"us": rule_us}, {})] if rule_us else [({"error": "x"}, {})]
    return point, rows + [({"us": us}, {"stages": stage}) for stage, us in enumerate(others, 2)]


def right(jobs):
    return [{**job._asdict(), "failed": ""} for job in jobs]


def test_the_rule_stays_where_nothing_is_faster_by_more_than_chance():
    point, timed = point_and_rows(100.0, 100 * (1 - GAIN / 2), 130.0)
    assert best(point, timed, right)["config"] == {}
    point, timed = point_and_rows(100.0, 130.0, 100 * (1 - 2 * GAIN))
    assert best(point, timed, right)["config"] == {"stages": 3}


def test_a_config_that_is_wrong_at_full_size_gives_way_to_the_next():
    def first_is_wrong(jobs):
        stages = json.loads(jobs[0].piece)["config"]["stages"]
        return [{"failed": "error" if stages == 2 else ""}]

    point, timed = point_and_rows(100.0, 50.0, 60.0)
    assert best(point, timed, first_is_wrong)["config"] == {"stages": 3}


def test_what_was_not_reached_keeps_its_entry(tmp_path):
    file = tmp_path / "nvidia-h200.json"
    first, second = Point(DECODE, "decode", "mosaic"), Point(DECODE._replace(tokens=8), "decode", "mosaic")
    rows = [best(point, point_and_rows(100.0, 50.0)[1], right) for point in (first, second)]
    file.write_text(written(file, H200, [first, second], rows, {"date": "monday"}))
    before = json.loads(file.read_text())
    unreached = best(second, point_and_rows(None)[1], right)
    again = best(first, point_and_rows(100.0, 200.0, 40.0)[1], right)
    after = json.loads(written(file, H200, [first, second], [again, unreached], {"date": "friday"}))
    assert [run["date"] for run in before["runs"]] == ["monday"]
    assert {entry["tokens"]: after["runs"][entry["run"]]["date"] for entry in after["entries"]} == {
        8: "monday",
        64: "friday",
    }
    assert {entry["tokens"]: entry["config"] for entry in after["entries"]} == {8: {"stages": 2}, 64: {"stages": 3}}


def test_a_grid_names_fields_of_its_kernel():
    for part, name in GRIDS:
        if name in dict(KERNELS[part]):
            config = dict(KERNELS[part])[name].Config
            assert all(config(**fields) for fields in grid(part, name))


def test_a_grid_of_unknown_fields_is_an_error_that_says_where(kernel, monkeypatch):
    monkeypatch.setitem(GRIDS, ("decode", "mosaic"), {"stags": (1,)})
    with pytest.raises(ValueError, match=r"decode of mosaic has no stags, only stages.*: change GRIDS"):
        list(grid("decode", "mosaic"))


def test_spills_are_counted_and_nothing_is_timed(tmp_path, kernel, monkeypatch):
    monkeypatch.setattr(kernels_trial, "spills", lambda dump: 64)
    job = Job("tune", DECODE.name, "mosaic", json.dumps({"part": "decode", "config": {}, "full": False}))
    row = kernels_trial.trial(job, {"small": True, "memory_bytes": 1, "dump": str(tmp_path)}, timer)
    assert row == {"failed": "64 bytes spill"}


def test_a_dry_run_lists_every_config(capsys):
    assert tune.main(["--dry", "--target", "h200", "--case", "llama-8b decode 1"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("llama-8b decode 1: decode by mosaic") and "stages 2, resident 1" in said


def test_without_a_gpu_there_is_nothing_to_tune(capsys):
    """Costs one start of a process."""
    assert tune.main(["--dry"]) == 0
    assert "nothing to tune" in capsys.readouterr().out
