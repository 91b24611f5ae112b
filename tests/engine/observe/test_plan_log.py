"""The log on disk: whole, private, in order, and never in the way of the lane that writes it."""

import logging
import os
import stat
import threading
import zlib

import numpy as np
import pytest

from engine.errors import ConfigError, Malformed
from engine.observe import plan_writer
from engine.observe.plan_bytes import MAX_BYTES, encode_plan
from engine.observe.plan_log import FRAME, HEAD, MAGIC, PLAN, Failure, Moved, PlanLog, Reset, frame
from engine.observe.plan_writer import PlanWriter, open_log

LARGE = 1 << 30


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "plans"


def write(folder, steps, count=4):
    """A log of some plans, results and the rest; its file."""
    log = open_log(folder, steps.HEADER, LARGE)
    for k in range(count):
        log.plan(steps.plan(k))
        log.result(steps.result(k))
    log.failure(7, "collect", RuntimeError("secret"))
    log.reset()
    log.moved([3, 5])
    log.close()
    return max(folder.iterdir())


def test_a_log_is_read_back_in_order(folder, steps):
    log = PlanLog(write(folder, steps))
    records = list(log.records())
    assert log.header == steps.HEADER and log.lost_bytes == 0
    plans, results = records[:8:2], records[1:8:2]
    assert [encode_plan(plan) for plan in plans] == [encode_plan(steps.plan(k)) for k in range(4)]
    assert all((results[k].tokens == steps.result(k).tokens).all() for k in range(4))
    assert records[8:10] == [Failure(7, "collect", "RuntimeError"), Reset()]
    assert isinstance(records[10], Moved) and records[10].blocks.tolist() == [3, 5] and len(records) == 11


def test_only_its_user_can_read_a_log(folder, steps, caplog):
    with caplog.at_level(logging.WARNING):
        path = write(folder, steps)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700 and stat.S_IMODE(path.stat().st_mode) == 0o600
    assert caplog.text.count("token ids of all prompts") == 1


def test_a_folder_that_others_can_look_into_is_refused(folder, steps):
    folder.mkdir()
    folder.chmod(0o750)
    with pytest.raises(ConfigError, match="mode 0750'; expected 0700"):
        open_log(folder, steps.HEADER, LARGE)
    file = folder / "file"
    file.touch()
    for wrong in (file, file / "below"):
        with pytest.raises(ConfigError, match="plan_log: got"):
            open_log(wrong, steps.HEADER, LARGE)
    assert list(folder.iterdir()) == [file]


def test_a_second_log_stands_beside_the_first(folder, steps):
    first = write(folder, steps)
    before = first.read_bytes()
    second = write(folder, steps)
    assert (first.name, second.name) == ("lane-0-0001.plans", "lane-0-0002.plans")
    assert first.read_bytes() == before


def test_a_log_cut_anywhere_is_read_up_to_its_last_whole_record(folder, steps):
    path = write(folder, steps, count=1)
    data = path.read_bytes()
    ends, at = [], len(MAGIC)
    while at < len(data):
        at += FRAME.size + FRAME.unpack_from(data, at)[1]
        ends.append(at)
    near = {end + k for end in ends for k in (-1, 0, 1, FRAME.size)} | set(range(ends[0], len(data), 13))
    for size in sorted(size for size in near if ends[0] <= size <= len(data)):
        path.write_bytes(data[:size])
        log = PlanLog(path)
        whole = [end for end in ends if end <= size]
        assert len(list(log.records())) == len(whole) - 1 and log.lost_bytes == size - whole[-1]
    for size in (0, 3, len(MAGIC), len(MAGIC) + 1, len(MAGIC) + FRAME.size, ends[0] - 1):
        path.write_bytes(data[:size])
        with pytest.raises(Malformed, match="first bytes|without a header"):
            PlanLog(path)


def test_a_changed_byte_anywhere_is_found_and_its_record_named(folder, steps):
    path = write(folder, steps, count=1)
    data = path.read_bytes()
    for at in [*range(0, len(data), 7), *range(len(data) - FRAME.size, len(data))]:
        changed = bytearray(data)
        changed[at] ^= 1 << at % 8
        path.write_bytes(changed)
        with pytest.raises(Malformed, match=r"record \d+|first bytes"):
            list(PlanLog(path).records())
    second = len(MAGIC) + FRAME.size + FRAME.unpack_from(data, len(MAGIC))[1]
    changed = bytearray(data)
    changed[second + FRAME.size + 3] ^= 1
    path.write_bytes(changed)
    with pytest.raises(Malformed, match="record 1: got a body of another checksum"):
        list(PlanLog(path).records())


def test_a_head_that_claims_more_than_a_record_may_have_is_damage_and_no_end(folder, steps):
    path = write(folder, steps, count=0)
    head = HEAD.pack(PLAN, MAX_BYTES + 1)
    path.write_bytes(path.read_bytes() + FRAME.pack(PLAN, MAX_BYTES + 1, zlib.crc32(head), 0))
    with pytest.raises(Malformed, match="record 4: got a head"):
        list(PlanLog(path).records())


def test_a_record_that_is_whole_and_says_nothing_known_is_named(folder, steps):
    path = write(folder, steps, count=0)
    data = path.read_bytes()
    for kind, body in ((9, b""), (PLAN, b"\xc0"), (0, b""), (3, b""), (4, b"x"), (5, b"abc")):
        path.write_bytes(data + frame(kind, body))
        with pytest.raises(Malformed, match="record 4: "):
            list(PlanLog(path).records())


def test_a_file_that_cannot_be_read_is_a_mistake_of_the_caller(tmp_path):
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(ConfigError, match="FILE: got"):
            PlanLog(path)


def stopped(log, told, caplog, cause, words):
    """The log said once that it stopped, and counted it once."""
    assert log.stopped == cause and told == [cause] and caplog.text.count("the plan log stops") == 1
    assert words in caplog.text and "serving goes on" in caplog.text


def test_a_full_disk_stops_the_log_and_nothing_else(steps, caplog):
    told = []
    log = PlanWriter(os.open("/dev/full", os.O_WRONLY), steps.HEADER, LARGE, told.append)
    for k in range(5):
        log.plan(steps.plan(k))
        log.flush()
    stopped(log, told, caplog, "disk", "No space left on device")
    log.close()


def test_a_queue_that_is_full_stops_the_log_at_once(steps, caplog, monkeypatch):
    """The disk here is a pipe that nobody reads."""
    monkeypatch.setattr(plan_writer, "QUEUE_BYTES", 300_000)
    reading, writing = os.pipe()
    told, result = [], steps.result(4)
    log = PlanWriter(writing, steps.HEADER, LARGE, told.append)
    for _ in range(20_000):
        log.result(result)
    stopped(log, told, caplog, "queue", "300000 bytes wait for the disk")
    reader = threading.Thread(target=lambda: [None for _ in iter(lambda: os.read(reading, 1 << 20), b"")])
    reader.start()
    log.close()
    reader.join(5)
    os.close(reading)
    assert not reader.is_alive()


def test_a_log_keeps_to_its_size(folder, steps, caplog):
    told = []
    log = open_log(folder, steps.HEADER, 5000, told.append)
    for k in range(200):
        log.plan(steps.plan(k % 9))
    stopped(log, told, caplog, "size", "the 5000 bytes of plan_log_size")
    log.close()
    [path] = folder.iterdir()
    again = PlanLog(path)
    assert len(list(again.records())) >= 3 and again.lost_bytes == 0 and 3000 < path.stat().st_size <= 5000


def test_a_log_that_stopped_says_nothing_more_when_its_disk_fails_too(steps, caplog):
    reading, writing = os.pipe()
    told = []
    log = PlanWriter(writing, steps.HEADER, 200_000, told.append)  # the pipe holds less, and its writer waits
    while not log.stopped:
        log.plan(steps.plan(1))
    os.close(reading)
    log.close()
    stopped(log, told, caplog, "size", "the 200000 bytes")


def test_a_step_that_no_record_can_hold_stops_the_log(folder, steps, caplog):
    told = []
    log = open_log(folder, steps.HEADER, LARGE, told.append)
    result = steps.result(4)
    object.__setattr__(result, "step", 2**70)
    log.result(result)
    stopped(log, told, caplog, "record", "does not fit")
    log.close()


def test_a_plan_is_logged_as_it_was_when_it_was_launched(folder, steps):
    """The scheduler goes on writing to arrays that a plan shows."""
    seed = next(k for k in range(99) if steps.plan(k).loads)
    plan = steps.plan(seed)
    log = open_log(folder, steps.HEADER, LARGE)
    log.plan(plan)
    plan.loads[0].tokens[:] = 0
    log.close()
    [record] = PlanLog(next(folder.iterdir())).records()
    assert np.array_equal(record.loads[0].tokens, steps.plan(seed).loads[0].tokens)
