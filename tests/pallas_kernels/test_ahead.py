"""Compiled for GPUs and TPUs that are not there, and interpreted where jax can: by a second Python.

The environments take minutes to make once (second_python.py), the gate about 200 s on two cores.
"""

import functools
import json
import os
import subprocess

import pytest

from bench import ahead, ahead_step
from pallas_kernels import served
from tests.pallas_kernels import early, second_python

NAMES = [row.name for row in served.SERVED] + list(ahead.STEPS)
FOLDER = ahead.ROOT / "tests/pallas_kernels"
FOLDERS = ("mosaic", "triton", "xla")
TPU_SCRIPT = """
import sys, jax
from jax.experimental import topologies
from bench.ahead_compile import lower_row
from pallas_kernels.served import SERVED
jax.devices()
device = topologies.get_topology_desc("v5e:2x2", "tpu").devices[0]
for row in SERVED:
    if row.name in sys.argv[1:]:
        compiled = lower_row(row._replace(by="xla", target="v5e"), device).compile()
        print(compiled.memory_analysis().temp_size_in_bytes, row.name)
"""


def run(python, *words, **environment):
    """A process of another Python, which sees the checkout and no accelerator."""
    environment = dict(os.environ, PYTHONPATH=str(ahead.ROOT), JAX_PLATFORMS="cpu", **environment)
    command = [python, "-W", "ignore::DeprecationWarning", *words]
    return subprocess.run(command, env=environment, cwd=ahead.ROOT, capture_output=True, text=True, timeout=1800)


def compile_rows():
    """Everything that is served, compiled ahead of time."""
    return ahead.compile_all(second_python.environment(*second_python.wanted()), NAMES, workers=1)


def run_folder(folder):
    """The tests of a folder, by the second Python."""
    if second_python.find() is None:
        pytest.skip("no Python of 3.12 to 3.14 runs here")
    python = second_python.environment(second_python.find(), second_python.GPU)
    return run(python, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider", str(FOLDER / folder))


JOBS = {folder: functools.partial(run_folder, folder) for folder in FOLDERS} | {"compiled": compile_rows}


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_kernels_pass_their_tests_in_a_second_python_too(folder, request):
    """Costs minutes. Mosaic is interpreted only there; the others show that a newer jax changes nothing."""
    if folder == "mosaic":
        reason = "no Python of 3.12 to 3.14 runs here" if second_python.find() is None else "no environment for it"
        request.config.stash[second_python.SUMMARY] = f"Mosaic numerics NOT checked: {reason}"
    done = early.result(request.config, folder, JOBS[folder])
    said = done.stdout.strip().splitlines() or [done.stderr]
    print(said[-1])
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in said[-1]
    if folder == "mosaic":
        request.config.stash[second_python.SUMMARY] = (
            f"Mosaic numerics checked on jax {second_python.JAX}: {said[-1]}"
        )


@pytest.fixture(scope="module")
def kind():
    return second_python.wanted()[1]


@pytest.fixture(scope="module")
def compiled(request):
    """One build for all tests."""
    return early.result(request.config, "compiled", compile_rows)


def test_every_served_row_compiles_as_recorded(compiled, kind):
    recorded = json.loads(ahead.RECORDED.read_text())[kind.jax]
    off = ahead.differences(compiled, recorded["rows"])
    assert not off, "\n".join([*off, f"if that is as it should be, with jax {kind.jax}: {ahead.REFRESH}"])


def test_the_record_names_the_compilers_that_are_pinned(kind):
    recorded = json.loads(ahead.RECORDED.read_text())[kind.jax]
    assert [f"{name}=={version}" for name, version in recorded["packages"].items()] == ahead.pinned(kind.jax)


def test_no_kernel_spills_and_the_assembler_warns_of_nothing(compiled):
    kernels = {(name, kernel): each for name, row in compiled.items() for kernel, each in row["kernels"].items()}
    assert kernels and not {who for who, each in kernels.items() if each["spill_bytes"] or each["warnings"]}


@pytest.mark.parametrize("row", served.SERVED, ids=lambda row: row.name)
def test_who_serves_a_row_is_in_its_program(row, compiled, kind):
    by = compiled[row.name]["by"]
    assert {name for name, count in compiled[row.name]["calls"].items() if count} == set(by) - {"xla"}
    assert by == list(row.parts) or kind is second_python.OLD_GPU


@pytest.mark.parametrize("name", ahead.STEPS)
def test_a_step_over_eight_devices_sends_what_was_planned(name, compiled):
    assert compiled[name]["collectives"] == compiled[name]["planned_collectives"]


@pytest.mark.parametrize("name", ahead.STEPS)
def test_a_step_writes_its_cache_in_place_and_moves_none_of_it(name, compiled):
    row = compiled[name]
    assert row["alias_bytes"] >= row["pool_bytes"]
    assert row["moved"] == []
    assert row["temp_bytes"] < row["planned_temp_bytes"]


def test_a_step_can_be_one_call_of_the_host(compiled):
    """Kernels and collectives are all such as a command buffer holds."""
    assert {name: row["host_calls"] for name, row in compiled.items() if "one graph" in name} == {
        step.name: 1 for step in ahead_step.STEPS if step.odd == "one graph"
    }


@pytest.mark.parametrize("name", ahead.STEPS)
def test_a_step_calls_each_kernel_once_a_layer(name, compiled):
    row = compiled[name]
    assert sum(row["calls"].values()) == ahead_step.LAYERS * len(row["kernels"]) > 0


@pytest.mark.slow
def test_the_path_for_tpus_compiles_ahead_of_time():
    """Costs a minute, and once the making of an environment. Nothing of it runs."""
    base = second_python.find()
    if base is None:
        pytest.skip("no Python of 3.12 to 3.14 runs here")
    python = second_python.environment(base, second_python.TPU)
    names = ["llama-8b decode 64", "llama-8b mixed 512", "gpt-oss-20b decode 64", "llama-8b decode 64 invariant"]
    done = run(python, "-c", TPU_SCRIPT, *names, TPU_SKIP_MDS_QUERY="1")
    assert done.returncode == 0, done.stderr[-4000:]
    assert sorted(line.partition(" ")[2] for line in done.stdout.splitlines() if line[:1].isdigit()) == sorted(
        names
    )
