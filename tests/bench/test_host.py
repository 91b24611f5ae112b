import json

import numpy as np

from bench import host
from bench.host import PARTS, Lane, Stopwatch, measure


def test_every_row_decodes_in_every_step_that_is_measured():
    lane = Lane(num_rows=5, block_size=16, max_length=256, prompt=4, steps=80)
    lane.fill()
    for _ in range(20):
        assert all(part > 0 for part in lane.turn())
        newest = lane.scheduler.flights[-1].plan
        assert newest.one_token and sorted(newest.rows[:, 0].tolist()) == [0, 1, 2, 3, 4]
    lane.scheduler.check()
    assert len(lane.scheduler.flights) == 2 and np.all(newest.rows[:, 1] > 4)


def test_a_measurement_says_where_all_of_the_time_goes():
    row = measure(3, steps=40, block_size=16, max_length=256, prompt=4)
    assert row["rows"] == 3 and row["quiet us"] <= row["step us"] <= row["p90 us"]
    assert set(row["parts"]) == {*PARTS, "rest of schedule", "rest of settle", "pack", "read result"}
    assert 0 < sum(row["parts"].values()) < 20 * row["step us"]


def test_a_part_inside_another_is_charged_once():
    class Work:
        def inner(self):
            return sum(range(20000))

        def outer(self):
            return self.inner()

    work, watch = Work(), Stopwatch()
    watch.wrap(work, "inner", "inner")
    watch.wrap(work, "outer", "outer")
    assert work.outer() == sum(range(20000))
    assert watch.spent["inner"] > 5 * watch.spent["outer"] > 0


def test_the_command_shows_and_keeps_its_rows(tmp_path, capsys):
    file = tmp_path / "host.jsonl"
    assert (
        host.main(["--rows", "2", "--steps", "10", "--prompt", "4", "--max-length", "256", "--out", str(file)]) == 0
    )
    assert "where it goes" in capsys.readouterr().out
    assert json.loads(file.read_text())["figures"]["rows"] == 2
