"""The processes of a lane in one life: all come and fit, or a sentence says who did not."""

import random

import pytest

from engine.cluster.group import HELLO_S, Group, unlike

HOSTS = ("h0", "h1", "h2")
ALIKE = {"jax": "0.10.2", "numerics": "invariant"}


def hello(alike=ALIKE, **words):
    return {"event": "hello", "alike": alike, **words}


def ready(rank):
    return {"event": "ready", "rank": rank, "blocks": 100 + rank}


def test_all_are_told_to_start_when_the_last_has_come_with_what_the_first_listens_at():
    group = Group(HOSTS, 0.0)
    assert group.heard(2, hello()) == [] and not group.heard(0, hello(orders="there:1", coordinator="there:2"))
    said = group.heard(1, hello())
    assert [rank for rank, _ in said] == [0, 1, 2]
    start = said[0][1]["start"]
    assert all(words == {"start": start} for _, words in said)
    assert (start["orders"], start["coordinator"]) == ("there:1", "there:2")
    assert len(bytes.fromhex(start["secret"])) == 32
    other = Group(("h",), 0.0).heard(0, hello())[0][1]["start"]
    assert other["secret"] != start["secret"] and other["orders"] == ""


def test_a_lane_is_ready_when_every_process_is_and_by_the_words_of_the_first():
    group = Group(HOSTS, 0.0)
    for rank in range(3):
        group.heard(rank, hello())
    for rank in (1, 0):
        assert group.heard(rank, ready(rank)) == [] and group.facts is None
    group.heard(2, ready(2))
    assert group.facts == ready(0) and group.code == 0 and group.problem == ""


@pytest.mark.parametrize(
    "theirs, words",
    [
        (ALIKE | {"jax": "0.11.0"}, "rank 1 on h1: jax is 0.11.0, and at rank 0 it is 0.10.2; all processes"),
        (ALIKE | {"seed": "4"}, "rank 1 on h1: seed is 4, and at rank 0 it is not set; all processes"),
        ({"jax": "0.10.2"}, "rank 1 on h1: numerics is not set, and at rank 0 it is invariant; all processes"),
    ],
)
def test_one_that_does_not_fit_is_named_with_the_difference_and_nobody_starts(theirs, words):
    group = Group(HOSTS, 0.0)
    said = [*group.heard(0, hello()), *group.heard(1, hello(theirs)), *group.heard(2, hello())]
    assert said == [] and group.code == 78 and group.problem.startswith(words)


def test_who_has_not_come_in_time_is_named_once_by_rank_and_host():
    group = Group(HOSTS, 5.0)
    group.heard(0, hello())
    group.heard(2, hello())
    assert group.look(5.0 + HELLO_S) == "" and group.code == 0
    notice = group.look(5.1 + HELLO_S)
    assert notice.startswith("rank 1 on h1 has said nothing for 10 s") and "serac doctor --hosts" in notice
    assert (group.code, group.problem) == (69, notice) and group.look(99.0) == ""


def test_the_only_process_of_a_lane_has_no_rank_in_a_message():
    group = Group(("this host",), 0.0)
    assert group.look(HELLO_S + 1).startswith("its process on this host has said nothing")


def test_a_patient_group_names_who_is_missing_again_and_again_and_waits():
    group = Group(HOSTS, 0.0, patient=True)
    assert not group.begun
    times = [second for second in range(40) if group.look(float(second))]
    assert times == [11, 22, 33] and group.code == 0 and group.problem == ""
    for rank in range(3):
        said = group.heard(rank, hello())
    assert len(said) == 3 and group.begun and group.look(1000.0) == ""


def test_a_group_that_has_started_misses_nobody_and_a_second_hello_changes_nothing():
    group = Group(HOSTS, 0.0)
    for rank in range(3):
        group.heard(rank, hello())
    assert group.heard(1, hello({"jax": "1"})) == [] and group.look(1e6) == "" and group.code == 0


def test_the_first_reason_that_a_process_gives_is_the_problem():
    group = Group(HOSTS, 0.0)
    group.heard(2, {"event": "lost", "reason": "the leader of p0 has ended"})
    group.heard(0, {"event": "lost", "reason": "x" * 9000})
    assert group.problem == "rank 2 on h2: the leader of p0 has ended" and group.code == 0
    long = Group(HOSTS, 0.0)
    long.heard(0, {"event": "lost", "reason": "x" * 9000})
    assert len(long.problem) < 600


def test_how_far_each_has_come_is_kept_by_rank():
    group = Group(HOSTS, 0.0)
    group.heard(1, {"event": "stage", "stage": "load", "done": 3, "of": 9})
    group.heard(1, {"event": "stage", "stage": "compile", "done": 1, "of": 2})
    group.heard(2, {"event": "stage"})
    assert group.stages == {1: ("compile", 1, 2), 2: ("", 0, 0)}
    assert group.heard(0, {"event": "something new"}) == [] and group.heard(0, {}) == []


@pytest.mark.parametrize("seed", range(60))
def test_whatever_comes_in_whatever_order_a_lane_starts_once_and_is_ready_only_when_whole(seed):
    rng = random.Random(seed)
    hosts = tuple(f"h{k}" for k in range(rng.randint(1, 5)))
    group, now, came, done, started = Group(hosts, 0.0), 0.0, {}, set(), 0
    for _ in range(60):
        rank = rng.randrange(len(hosts))
        match rng.choice(("hello", "hello", "ready", "stage", "look", "lost")):
            case "hello":
                alike = ALIKE if rng.random() < 0.93 else ALIKE | {"jax": "1"}
                whole = len(came) == len(hosts)
                came = came if whole else came | {rank: alike}
                said = group.heard(rank, hello(alike))
                fit = len(came) == len(hosts) and all(each == came[0] for each in came.values())
                assert bool(said) == (fit and not whole)
                started += bool(said)
            case "ready":
                done.add(rank)
                group.heard(rank, ready(rank))
            case "stage":
                group.heard(rank, {"event": "stage", "stage": "load", "done": 1, "of": 2})
            case "look":
                now += rng.random() * 2
                late = now > HELLO_S and len(came) < len(hosts) and not group.code
                assert bool(group.look(now)) == late
            case "lost" if rng.random() < 0.1:
                group.heard(rank, {"event": "lost", "reason": "r"})
        assert started <= 1 and (group.facts is not None) == (len(done) == len(hosts))
        unfit = len(came) == len(hosts) and any(each != came[0] for each in came.values())
        assert (
            group.code in (0, 69, 78)
            and (not unfit or group.code in (69, 78))
            and (not group.code or group.problem)
        )


def test_nothing_is_unlike_itself_and_long_values_are_cut():
    assert unlike(ALIKE, dict(ALIKE)) == ""
    assert len(unlike({"a": "x" * 500}, {"a": "y" * 500})) < 250
