"""`serac replay` on the embedded model: what it says, its exit code, and what it refuses."""

import dataclasses
import io
import re
import shutil

import pytest
from prometheus_client import CollectorRegistry

from engine import cli, embedded, replay_report
from engine.config import Settings
from engine.core.plan import StepPlan
from engine.errors import ConfigError, Malformed, ModelError
from engine.llm import LLM
from engine.observe.metrics import Metrics
from engine.observe.plan_log import PlanLog
from engine.observe.plan_writer import open_log
from engine.replica import build

SMALL = {"max_num_seqs": 1, "max_num_batched_tokens": 16, "max_model_len": 64, "kv_memory": 2**24}
INVARIANT = Settings(mesh="tp=1", numerics="invariant")


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """The device of a lane that did a few steps, and the file of its log."""
    folder = tmp_path_factory.mktemp("log") / "plans"
    llm = LLM("embedded", mesh="tp=1", numerics="invariant", plan_log=folder, **SMALL)
    llm.generate(["def main(", "class A:"], max_tokens=5, seed=3)
    llm.generate(["x = "], max_tokens=3, logprobs=2)
    device = llm.replica.lanes[0]._device
    device.log.close()
    [path] = folder.iterdir()
    return device.device, path


@pytest.fixture
def logged(recorded, monkeypatch):
    """The log; it is replayed on the runner that made it, which spares loading and compiling."""
    runner, path = recorded
    runner.reset()
    monkeypatch.setattr(replay_report, "make_runner", lambda *_: runner)
    return path


def report(path, settings=INVARIANT):
    out = io.StringIO()
    code = replay_report.run(PlanLog(path), settings, out)
    return code, out.getvalue()


def rewritten(path, tmp_path, change=lambda header: {}, of=lambda record: record):
    """The log at `path` with another header or other records."""
    log = PlanLog(path)
    writer = open_log(tmp_path / "other", dataclasses.replace(log.header, **change(log.header)), 1 << 30)
    for record in log.records():
        writer.plan(record) if hasattr(record, "rows") else writer.result(of(record))
    writer.close()
    return max((tmp_path / "other").iterdir())


def test_the_command_replays_a_log_as_it_was(recorded, capsys):
    code = cli.main(["replay", str(recorded[1])])
    text = capsys.readouterr().out
    assert code == 0 and text.endswith("\nequal\n")
    assert re.search(r"\n(\d+) steps, \d+ rows, 13 points compared, [\d.]+ steps/s\n", text)
    assert "logged on tp=1, invariant; replayed on tp=1, invariant\n" in text


def test_a_changed_token_is_named_and_the_code_is_1(logged, tmp_path):
    def change(result):
        return dataclasses.replace(result, tokens=result.tokens + 1) if result.step == 4 else result

    code, text = report(rewritten(logged, tmp_path, of=change))
    assert code == 1 and re.search(r"first difference: step 4, point 0, tokens: wanted (\d+), got (\d+)\n", text)


def test_the_command_takes_another_mesh_and_numerics_and_says_so(logged, capsys):
    assert cli.main(["replay", str(logged), "embedded", "--mesh", "tp=2", "--numerics", "fast"]) in (0, 1)
    assert "logged on tp=1, invariant; replayed on tp=2, fast\n" in capsys.readouterr().out
    assert cli.main(["replay", str(logged), "--numerics", "exact"]) == 2
    assert "--numerics: got 'exact'; expected one of fast, invariant" in capsys.readouterr().err


def test_a_cut_log_says_how_much_is_lost_and_a_damaged_one_where(logged, tmp_path):
    data = logged.read_bytes()
    path = tmp_path / "cut"
    path.write_bytes(data[:-3])
    code, text = report(path)
    assert code == 0 and re.search(r"\n\d+ bytes of a cut record at the end, lost\n", text) and "not hold" in text
    path.write_bytes(data[:900] + bytes([data[900] ^ 1]) + data[901:])
    with pytest.raises(Malformed, match=r"cut: record \d+: got a .* of another checksum"):
        report(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"revision": "0" * 40}, "revision: got .* as the log says"),
        ({"vocab": 5}, "vocab: got .*; expected 5, as the log says"),
        ({"max_length": 10**6}, "max_model_len: got 1000000; expected at most the model's context"),
    ],
)
def test_another_model_is_refused_before_its_weights_are_read(logged, tmp_path, monkeypatch, change, words):
    monkeypatch.setattr(replay_report, "make_runner", lambda *_: pytest.fail("weights were read"))
    with pytest.raises((ModelError, ConfigError), match=words):
        report(rewritten(logged, tmp_path, lambda header: change))


def test_a_model_that_was_changed_in_place_is_another(logged, tmp_path):
    shutil.copytree(embedded.folder(), tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    config.write_text(config.read_text() + " ")
    with pytest.raises(ModelError, match="revision: got"):
        report(logged, dataclasses.replace(INVARIANT, model=str(tmp_path / "model")))


def test_a_log_that_stops_is_counted_and_without_the_setting_there_is_none(logged, tmp_path):
    header, metrics = PlanLog(logged).header, Metrics(CollectorRegistry())
    log = build.open_plan_log(Settings(plan_log=tmp_path / "small", plan_log_size=1000), header, metrics)
    for record in PlanLog(logged).records():
        if isinstance(record, StepPlan):
            log.plan(record)
    log.close()
    assert metrics.value("plan_logs_stopped", "size") == 1 and log.stopped == "size"
    assert build.open_plan_log(Settings(), header, metrics) is None


def test_a_folder_that_will_not_do_is_refused_before_weights_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "load", lambda *_, **__: pytest.fail("weights were read"))
    tmp_path.chmod(0o755)
    with pytest.raises(ConfigError, match="plan_log: got 'a folder of mode 0755'"):
        LLM("embedded", mesh="tp=1", plan_log=tmp_path, **SMALL)


def test_a_log_is_replayed_on_one_lane(logged):
    with pytest.raises(ConfigError, match="mesh: got .*dp=2.*; expected one lane"):
        report(logged, dataclasses.replace(INVARIANT, mesh="dp=2,tp=1"))
