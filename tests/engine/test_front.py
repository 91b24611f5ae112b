"""The front of workers: what it never loads, what it refuses, and how a worker's refusal reaches the caller."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from engine import front
from engine.cluster import local
from engine.cluster.found import Found, Gpu
from engine.cluster.topology import Host
from engine.config import Settings
from engine.errors import ConfigError
from engine.lanes import LOCAL, parse_lanes

ROOT = Path(front.__file__).parents[1]


def python(*arguments):
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_the_front_and_its_server_never_load_jax():
    """A device that fails takes its own worker along, so the process that holds the streams has none."""
    done = python(
        "-c", "import engine.front, engine.launch, sys; print(sorted({'jax', 'jaxlib'} & {*sys.modules}))"
    )
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "workers: got no --lanes; expected lanes to start"),
        ({"lanes": "both:tp=1", "mesh": "tp=1"}, "lanes: got --mesh as well; expected one of the two"),
        ({"lanes": "decode:tp=1"}, "lanes: got decode lanes only"),
    ],
)
def test_what_does_not_go_with_workers_is_refused_before_any_starts(settings, words, monkeypatch):
    monkeypatch.setattr(front, "Supervisor", lambda *_: pytest.fail("a worker was started"))
    with pytest.raises(ConfigError, match=re.escape(words)):
        front.replica(Settings(workers=True, **settings), lambda *_: None)


def test_more_devices_than_there_are_is_one_sentence_and_exit_code_2():
    """The worker finds out; `serac serve` says it. Costs about ten seconds."""
    command = ["-m", "engine.cli", "serve", "embedded", "--lanes=prefill:tp=1, decode:tp=128", "--workers"]
    done = python(*command, "--device=cpu", "--port=0", "--admin-port=0")
    assert done.returncode == 2 and done.stdout == ""
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("serac: error: ")]
    assert said.startswith("serac: error: lane d1: mesh: tp=128 needs more devices than there are:"), said


def test_each_worker_gets_the_settings_of_its_lane_and_devices_of_its_own(monkeypatch):
    monkeypatch.setenv("SERAC_PORT", "9")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    settings = Settings(lanes="prefill:tp=1, decode:tp=2", workers=True, port=7, max_num_seqs=3, prefix_cache=False)
    commands = local.commands(front.here(settings), {LOCAL: Found(gpus=(Gpu("", "gpu", -1),) * 8)})
    shown = {slot: command.environment["CUDA_VISIBLE_DEVICES"] for slot, command in commands.items()}
    assert shown == {("p0", 0): "4", ("d1", 0): "5,6"}
    arguments = commands["d1", 0].arguments
    assert {"--mesh=tp=2", "--lane=d1", "--role=decode", "--max-num-seqs=3", "--prefix-cache=false"} <= {*arguments}
    assert not [word for word in arguments if word.startswith(("--port", "--lanes", "--workers"))]
    assert "SERAC_PORT" not in commands["d1", 0].environment and "SERAC_PORT" in os.environ


def test_a_worker_whose_front_goes_while_it_starts_does_not_stay():
    """Costs a few seconds."""
    command = [sys.executable, "-m", "engine.cli", "worker", "embedded", "--device=cpu", "--mesh=tp=1"]
    few = ["--max-num-seqs=1", "--max-num-batched-tokens=8", "--max-model-len=64", "--lane=b0"]
    done = subprocess.run([*command, *few], cwd=ROOT, input="", capture_output=True, text=True, timeout=120)
    assert done.returncode == -15 and '"ready"' not in done.stdout


def test_processes_of_this_machine_meet_at_unix_sockets_and_others_on_their_own_interface():
    here, there, pod = Host("a", "127.0.0.1", (0,)), Host("b", "10.0.0.2", (0,)), Host("c", "", (0,))
    assert front.listens("/tmp/serac", "p0", 1, here) == "unix:/tmp/serac/p0.1.sock"
    assert front.listens("/tmp/" + "long" * 30, "p0", 1, here) == ""
    assert front.listens("/tmp/serac", "p0", 1, there) == front.listens("/tmp/serac", "p0", 1, pod) == ""


def test_the_front_tells_of_all_workers_what_holds_for_each():
    lanes = parse_lanes("prefill:tp=1, decode:tp=2")
    common = {"model": "tiny", "num_blocks": 40, "compile_seconds": 1.5}
    prefill = {**common, "weights_bytes": 20, "kv_bytes": 5, "lane_axes": {"kv": 1}}
    decode = {**common, "weights_bytes": 10, "kv_bytes": 7, "lane_axes": {"kv": 2}, "num_blocks": 30}
    told = front.described(lanes, [prefill, decode])
    assert told["lanes"] == "p0 prefill on 1 device, d1 decode on 2 devices" and told["devices"] == 3
    assert (told["weights_bytes"], told["kv_bytes"], told["num_blocks"]) == (20, 7, 30)
    assert told["compile_seconds"] == 3.0 and told["lane_axes"] == {"p0": {"kv": 1}, "d1": {"kv": 2}}
    assert told["model"] == "tiny" and told["workers"] == 2
