"""What Ray is asked to place, and, with a real Ray on this machine, ranks that live, fail and live again."""

import importlib.util
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from engine.cluster import places
from engine.cluster import ray as over
from engine.cluster.ray import RestartWanted, groups, planned
from engine.cluster.reading import of_lanes, parse
from engine.cluster.topology import FrontPlace, Security
from engine.errors import ConfigError

FILE = """\
[[host]]
name = "h0"
address = "10.0.0.1"
devices = 9
[[host]]
name = "h1"
address = "10.0.0.2"
devices = 9
[[lane]]
name = "p0"
role = "prefill"
mesh = 8
hosts = ["h1", "h0"]
[[lane]]
name = "d1"
role = "decode"
mesh = 4
hosts = ["h0", "h0"]
[[lane]]
name = "d2"
role = "decode"
mesh = 3
hosts = ["h0", "h1", "h1"]
[front]
address = "10.0.0.1:50053"
[security]
certs = "/c"
secret_file = "/shared/secret"
trusted_network = true
"""
MADE = parse(FILE, "x.toml")


def test_a_lane_is_a_group_whose_bundles_stand_on_the_hosts_of_its_ranks():
    first, second, third = groups(MADE)
    assert first == ("serac-p0", "STRICT_SPREAD", [
        {"CPU": 1, "GPU": 4, "node:10.0.0.2": 0.001},
        {"CPU": 1, "GPU": 4, "node:10.0.0.1": 0.001},
    ])  # fmt: skip
    assert second == ("serac-d1", "STRICT_PACK", [{"CPU": 1, "GPU": 2, "node:10.0.0.1": 0.001}] * 2)
    assert third.strategy == "PACK" and len(third.bundles) == 3


def test_on_cpu_and_on_this_machine_a_bundle_asks_for_neither_gpu_nor_host():
    assert groups(of_lanes("both:tp=2", {"device": "cpu"})) == [("serac-b0", "STRICT_PACK", [{"CPU": 1}])]


def test_what_a_task_runs_is_the_worker_with_the_front_to_go_to():
    found = planned(MADE, places.assumed(MADE))
    assert list(found)[:2] == [("p0", 0), ("p0", 1)]
    assert "--front=10.0.0.1:50053" in found["p0", 0].arguments and "--lane=p0" in found["p0", 0].arguments


def test_without_a_secret_that_tasks_can_read_nothing_is_started():
    with pytest.raises(ConfigError, match="secret_file: got none in \\[security\\]"):
        over.start(of_lanes("both:tp=1"), "", "127.0.0.1:1")


def test_without_ray_a_start_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match="pip install 'serac\\[ray\\]'"):
        over.start(MADE, FILE, "10.0.0.1:50053")


@pytest.mark.parametrize("code", [0, 2, 78])
def test_an_end_that_no_other_start_mends_is_final(code):
    assert over.tied(["sh", "-c", f"exit {code}"], os.environ) == code


@pytest.mark.parametrize(("words", "code"), [("exit 75", 75), ("kill -9 $$", 137)])
def test_another_end_asks_for_another_start(monkeypatch, words, code):
    monkeypatch.setattr(over, "WAIT_S", 0.0)
    with pytest.raises(RestartWanted, match=f"exit code {code}"):
        over.tied(["sh", "-c", words], os.environ)


def test_a_tied_command_ends_with_all_it_started_when_its_input_ends(tmp_path):
    children = f"sleep 60 & echo $! > {tmp_path}/pid; echo up; wait"
    words = [sys.executable, "-m", "engine.cluster.tied", "sh", "-c", children]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "up\n"
        child = int((tmp_path / "pid").read_text())
        os.kill(child, 0)
        process.stdin.close()
        assert process.wait(10) == 143
    until = time.monotonic() + 5
    while alive(child) and time.monotonic() < until:
        time.sleep(0.01)
    assert not alive(child)


def test_a_tied_command_ends_when_who_keeps_it_is_killed():
    words = [sys.executable, "-m", "engine.cluster.tied", "sh", "-c", "echo $$; exec sleep 60"]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        child = int(process.stdout.readline())
        assert alive(child)
        process.kill()
    until = time.monotonic() + 5
    while alive(child) and time.monotonic() < until:
        time.sleep(0.01)
    assert not alive(child)


def alive(pid: int) -> bool:
    """Whether it runs; one that nobody has waited for yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture(scope="module")
def ray():
    if importlib.util.find_spec("ray") is None:
        pytest.skip("no Ray here: pip install 'serac[ray]'")
    import ray

    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield ray
    ray.shutdown()


def toy(folder):
    """A task in the place of the worker's: writes down each life, and ends as told by a file of its rank."""

    def task(text, lane, rank, front):
        from engine.cluster.ray import tied

        lives = f"{folder}/{lane}.{rank}"
        script = f"echo $$ >> {lives}; n=$(grep -c . {lives}); . {folder}/does"
        return tied(["sh", "-c", script, lane, str(rank)], dict(os.environ))

    return task


CPU = replace(
    of_lanes("prefill:tp=4/2, decode:tp=1", {"device": "cpu"}),
    security=Security(secret_file=Path("/none")),
    front=FrontPlace(address="127.0.0.1:1"),
)


def lives(folder, name):
    found = folder / name
    return found.read_text().split() if found.exists() else []


@pytest.mark.slow
def test_a_real_ray_starts_a_task_a_rank_and_again_after_75(ray, tmp_path):
    """Costs 20 s, most of it the start of Ray."""
    (tmp_path / "does").write_text(
        '[ "$0.$1.$n" = p0.1.1 ] && exit 75; [ "$0.$1.$n" = p0.1.2 ] && kill -9 $$; exit 0\n'
    )
    started = over.start(CPU, "", "127.0.0.1:1", task=toy(tmp_path))
    assert started.codes(60) == {("p0", 0): 0, ("p0", 1): 0, ("d1", 0): 0}
    started.stop()
    assert [len(lives(tmp_path, name)) for name in ("p0.0", "p0.1", "d1.0")] == [1, 3, 1]


@pytest.mark.slow
def test_ranks_over_ray_end_with_their_task(ray, tmp_path):
    """Costs 10 s."""
    (tmp_path / "does").write_text("exec sleep 300\n")
    started = over.start(CPU, "", "127.0.0.1:1", task=toy(tmp_path))
    until = time.monotonic() + 30
    while not all(lives(tmp_path, name) for name in ("p0.0", "p0.1", "d1.0")):
        assert time.monotonic() < until
        time.sleep(0.1)
    pids = [int(lives(tmp_path, name)[0]) for name in ("p0.0", "p0.1", "d1.0")]
    assert all(map(alive, pids)) and started.codes(0.1) == {}
    started.stop()
    until = time.monotonic() + 20
    while any(map(alive, pids)) and time.monotonic() < until:
        time.sleep(0.1)
    assert not any(map(alive, pids))


@pytest.mark.slow
def test_a_group_without_room_is_refused_in_time(ray, monkeypatch, tmp_path):
    """Costs 2 s."""
    monkeypatch.setattr(over, "PLACE_S", 1.0)
    gpus = replace(CPU, serve={})
    with pytest.raises(Exception, match="lane p0: Ray found no room for 2 ranks within 1 s"):
        over.start(gpus, "", "127.0.0.1:1", task=toy(tmp_path))
