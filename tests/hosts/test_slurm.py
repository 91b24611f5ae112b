"""The Slurm of the harness starts tasks with their ranks, and queues a job again that exits with 75.

Costs half a minute, most of it the time for which the controller holds a requeued job back.
"""

import signal
import time

import pytest

from tests.hosts import slurm
from tests.hosts.slurm import Slurm

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    if reason := slurm.why_not():
        pytest.skip(reason)
    with Slurm(tmp_path_factory.mktemp("slurm")) as one:
        yield one


def test_srun_starts_two_tasks_with_their_ranks(made):
    done = made.run(["srun", "-n2", "sh", "-c", "echo $SLURM_PROCID of $SLURM_NTASKS on $SLURM_STEP_NODELIST"])
    assert sorted(done.stdout.splitlines()) == ["0 of 2 on n0", "1 of 2 on n0"], done.stderr


def test_a_task_that_fails_ends_the_others_and_the_code_of_srun_is_the_highest_of_all(made):
    """So 75 of one task is hidden behind the 143 of those that were ended for it; a batch script says its own."""
    done = made.run(["srun", "-n2", "--kill-on-bad-exit", "sh", "-c", "[ $SLURM_PROCID = 0 ] && exit 69; sleep 60"])
    assert done.returncode == 128 + signal.SIGTERM


def test_a_job_that_exits_with_75_is_queued_again(made):
    """Costs 30 s."""
    job = made.folder / "job.sh"
    job.write_text(
        f"#!/bin/sh\necho restart ${{SLURM_RESTART_COUNT:-0}} >>{made.folder}/lives\n"
        "[ ${SLURM_RESTART_COUNT:-0} = 0 ] && exit 75\nexit 0\n"
    )
    assert "Submitted" in made.run(["sbatch", "--requeue", "--output=/dev/null", job]).stdout
    lives, until = made.folder / "lives", time.monotonic() + 90
    while not (lives.exists() and "restart 1" in lives.read_text()) and time.monotonic() < until:
        time.sleep(0.2)
    assert lives.read_text().splitlines() == ["restart 0", "restart 1"]
