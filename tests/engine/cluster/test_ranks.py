"""Which rank a process is by the environment of Slurm, a LeaderWorkerSet or flags, and what is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.cluster.ranks import nodes_of, rank_of
from engine.errors import ConfigError
from engine.lanes import LaneSpec

LANE = LaneSpec("p0", "prefill", 4, ("n1", "n2"))
SLURM = {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "n[1-2]", "SLURMD_NODENAME": "n2"}
LWS = {"LWS_WORKER_INDEX": "1", "LWS_GROUP_SIZE": "2", "LWS_LEADER_ADDRESS": "p0-0.p0.default"}


def test_the_rank_is_that_of_slurm_of_the_leader_worker_set_or_of_flags():
    assert rank_of(SLURM, LANE) == (1, "Slurm")
    assert rank_of(LWS, LANE) == (1, "LeaderWorkerSet")
    assert rank_of({}, LANE, 1) == (1, "flags") and rank_of(SLURM, LANE, 1).rank == 1


@pytest.mark.parametrize(
    ("environment", "rank", "words"),
    [
        ({}, None, "rank: nothing says which rank of p0 this is"),
        ({}, 2, "rank: flags says 2; expected 0..1, since p0 has 2 hosts"),
        (SLURM, 0, "rank: Slurm says 1, and flags 0; expected one alone, or the same"),
        (SLURM | LWS | {"LWS_WORKER_INDEX": "0"}, None, "rank: Slurm says 1, and LeaderWorkerSet 0"),
        (LWS | {"LWS_WORKER_INDEX": "2"}, None, "rank: LeaderWorkerSet says 2; expected 0..1"),
        (LWS | {"LWS_GROUP_SIZE": "4"}, None, "LWS_GROUP_SIZE: got 4; expected 2, the hosts of p0"),
        (LWS | {"LWS_WORKER_INDEX": "x"}, None, "LWS_WORKER_INDEX: expected a number, as LeaderWorkerSet sets it"),
        ({"SLURM_PROCID": "0"}, None, "SLURM_NTASKS: expected a number, as Slurm sets it"),
        (SLURM | {"SLURM_NTASKS": "3"}, None, "SLURM_NTASKS: got 3; expected 2, the hosts of p0"),
        (
            SLURM | {"SLURM_JOB_NODELIST": "n[1,3]"},
            None,
            "SLURM_JOB_NODELIST: n2 is not in it; expected every host",
        ),
        (SLURM | {"SLURMD_NODENAME": "n1"}, None, "SLURMD_NODENAME: rank 1 of p0 is on n1; expected n2, as srun"),
    ],
)
def test_a_rank_that_disagrees_with_the_hosts_of_the_lane_is_refused(environment, rank, words):
    with pytest.raises(ConfigError) as caught:
        rank_of(environment, LANE, rank)
    assert str(caught.value).startswith(words)


@pytest.mark.parametrize(
    ("text", "nodes"),
    [
        ("n0", ["n0"]),
        ("a,b", ["a", "b"]),
        ("n[1-3,07],m", ["n1", "n2", "n3", "n07", "m"]),
        ("n[08-11]", ["n08", "n09", "n10", "n11"]),
        ("r[1-2]n[0-1]", ["r1n0", "r1n1", "r2n0", "r2n1"]),
        ("a[1-2]-ib,b[3]", ["a1-ib", "a2-ib", "b3"]),
    ],
)
def test_a_list_of_nodes_is_read_as_slurm_writes_it(text, nodes):
    assert nodes_of(text) == nodes


@pytest.mark.parametrize("text", ["n[0-99999999]", "n[0-9999]m[0-9999]", "n[0-9999]," * 3])
def test_a_list_of_nodes_that_would_fill_the_memory_is_refused(text):
    with pytest.raises(ConfigError, match="more than 10000 names"):
        nodes_of(text)


@given(st.text("n[]-,0123456789", max_size=12))
def test_any_text_is_a_list_of_nodes_or_refused(text):
    try:
        assert all(isinstance(node, str) for node in nodes_of(text))
    except ConfigError as error:
        assert str(error).startswith("SLURM_JOB_NODELIST: ")
