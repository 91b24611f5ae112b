"""What the doctor makes of made-up facts."""

from dataclasses import replace

import pytest

from engine.cluster import agreement, checks
from engine.cluster.agreement import Seen
from engine.cluster.checks import GIB, MIB, Facts, Finding, Wanted

WELL = Facts(
    versions={"python": "3.11", "serac": "0.1.0", "jax": "0.10.2", "jaxlib": "0.10.2", "numpy": "2.1.0"},
    requires=["jax<0.13,>=0.10.2", "numpy>=2.0"],
    gpus=["NVIDIA H200", "NVIDIA H200"],
    driver="580.1",
    gpu_free=[0.99, 0.99],
    memory_free=64 * GIB,
    shm_free=8 * GIB,
    nofile=65536,
    wall_s=1.9e9,
    interface="eth0",
)
WANTED = Wanted(devices=(0, 1), on_gpus=True, spanning=True, listens=True)


def found(what, facts=WELL, wanted=WANTED):
    """The one finding of a check."""
    (one,) = [each for each in checks.of_host("h0", facts, wanted) if each.what == what]
    return one


def test_a_host_that_is_well_has_nothing_to_do():
    all_ = checks.of_host("h0", WELL, WANTED)
    assert {each.level for each in all_} == {"ok"} and not any(each.todo for each in all_)
    assert len(all_) == 11 and checks.code(all_) == 0


@pytest.mark.parametrize(
    ("what", "level", "words", "facts"),
    [
        ("python", "fail", "3.10", {"versions": {**WELL.versions, "python": "3.10"}}),
        ("packages", "fail", "jax 0.9.1, wants <0.13,>=0.10.2", {"versions": {**WELL.versions, "jax": "0.9.1"}}),
        ("packages", "fail", "jax 0.13.0", {"versions": {**WELL.versions, "jax": "0.13.0"}}),
        ("packages", "fail", "numpy is absent", {"versions": {**WELL.versions, "numpy": ""}}),
        ("devices", "fail", "has 1 GPUs, and lanes take device 1", {"gpus": ["NVIDIA H200"]}),
        ("devices", "fail", "no GPU", {"gpus": []}),
        ("devices", "fail", "JAX has no plugin", {"gpu_problem": "JAX has no plugin"}),
        ("devices", "warn", "others hold 60% of device 1", {"gpu_free": [0.99, 0.4]}),
        ("memory", "warn", "512 MiB free", {"memory_free": 512 * MIB}),
        ("shm", "fail", "63 MiB", {"shm_free": 63 * MIB}),
        ("shm", "warn", "64 MiB", {"shm_free": 64 * MIB}),
        ("nofile", "fail", "256 open files", {"nofile": 256}),
        ("nofile", "warn", "1,024 open files", {"nofile": 1024}),
        ("memlock", "warn", "8 MiB may be locked", {"memlock": 8 * MIB}),
        ("ports", "fail", "taken: port 50051", {"taken": ["port 50051"]}),
        ("clock", "warn", "0.80 of the wall clock", {"clock_ratio": 0.8}),
        ("clock", "fail", "never set", {"wall_s": 86400.0}),
        ("cache", "warn", "mode 0755", {"cache_problem": "its folder has mode 0755"}),
        ("interface", "fail", "no interface", {"interface": ""}),
    ],
)
def test_what_is_wrong_is_said_with_what_to_do(what, level, words, facts):
    one = found(what, replace(WELL, **facts))
    assert (one.level, one.host) == (level, "h0") and words in one.words and one.todo


def test_a_cpu_host_needs_no_gpus_and_its_name_must_lead_to_its_address():
    cpu = Wanted(on_gpus=False, spanning=True)
    bare = replace(WELL, gpus=[], memlock=64 * 1024)
    assert {each.level for each in checks.of_host("h0", bare, cpu)} == {"ok"}
    assert found("interface", replace(bare, named="loopback"), cpu).level == "fail"
    assert found("interface", replace(WELL, named="loopback")).level == "ok", "NCCL is told the interface"
    assert "beside 2 GPUs" in found("devices", WELL, cpu).words


def test_processes_of_one_machine_need_only_that_its_name_leads_somewhere():
    cpu, here = Wanted(spanning=True), replace(WELL, interface="lo")
    assert found("interface", replace(here, named="another address"), cpu).level == "ok"
    assert found("interface", replace(here, named="nothing"), cpu).level == "fail"


def test_a_host_that_talks_with_no_other_needs_no_address():
    assert "interface" not in [each.what for each in checks.of_host("h0", WELL, Wanted())]


def test_requirements_of_other_platforms_are_left_alone():
    assert checks.unmet(['uvloop>=0.20; sys_platform != "win32"'], {}) == []
    assert checks.unmet(["jax[cuda13]>=0.10.2"], {"jax": "0.10.2.dev3"}) == []


def test_the_exit_code_is_that_of_a_missing_host_before_any_other():
    wrong = checks.fail("shm", "small", "enlarge")
    assert checks.code([checks.warn("shm", "small", "enlarge")]) == 0
    assert checks.code([wrong]) == 2
    assert checks.code([wrong, agreement.missing("h1", "no answer", "is it up?")]) == 69


def test_hosts_of_other_versions_are_named_with_both():
    other = replace(WELL, versions={**WELL.versions, "jaxlib": "0.11.0", "tokenizers": "9"}, gpus=["NVIDIA H100"])
    versions, devices = agreement.of_hosts({"h0": WELL, "h1": other})
    assert versions[:4] == ("fail", "h1", "versions", "jaxlib 0.11.0, 0.10.2 on h0")
    assert devices[:4] == ("warn", "h1", "devices", "other devices than h0")
    assert agreement.of_hosts({"h0": WELL, "h1": WELL}) == [Finding("ok", "all", "versions", "the same on 2 hosts")]


def test_a_model_that_differs_or_cannot_be_read_is_named():
    facts = {"h0": WELL, "h1": WELL, "h2": WELL, "h3": replace(WELL, memory_free=GIB)}
    seen = {"h0": Seen("a" * 64, 2 * GIB), "h1": Seen("b" * 64, GIB), "h2": Seen(model_problem="no such folder"),
            "h3": Seen("a" * 64, 2 * GIB)}  # fmt: skip
    levels = [(each.host, each.level) for each in agreement.models(seen, facts, on_gpus=False)]
    assert levels == [("h0", "ok"), ("h1", "fail"), ("h2", "fail"), ("h3", "warn")]
    assert agreement.models(seen, facts, on_gpus=True)[3].level == "ok"


@pytest.mark.parametrize(("ahead_s", "level"), [(0.4, "ok"), (2.0, "warn"), (3600.0, "fail")])
def test_clocks_apart_are_told_who_is_ahead(ahead_s, level):
    (one,) = agreement.clocks({"h0": (0.0, 0.001), "h1": (ahead_s, 0.002)})
    assert one.level == level and (level == "ok" or "h1 is ahead of h0" in one.todo)


def test_a_skew_below_what_the_round_trip_can_tell_is_none():
    (one,) = agreement.clocks({"h0": (0.0, 0.001), "h1": (1.0, 0.5)})
    assert one.level == "ok"
    assert agreement.clocks({"h0": (7.0, 0.001)}) == []


def test_every_pair_that_does_not_reach_the_other_is_named_in_its_direction():
    reached = {("h0", "h1"): 0.001, ("h1", "h0"): None}
    assert [each[:5] for each in agreement.of_network(reached)] == [
        (
            "fail",
            "h1",
            "network",
            "does not reach h0",
            "open the ports between the hosts; correct address in [[host]]",
        )
    ]
    (one,) = agreement.of_network({("h0", "h1"): 0.001, ("h1", "h0"): 0.002})
    assert one.level == "ok" and "2 pairs" in one.words
