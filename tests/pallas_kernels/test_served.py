"""The table of served shapes: small, without doubles, told by the dispatcher as it stands, lowered in full."""

import subprocess
import sys

import jax
import pytest

from bench.ahead import ROOT
from pallas_kernels import served

LOWER = """
from bench.ahead_compile import lower_row
from pallas_kernels.served import SERVED
for row in SERVED:
    try:
        text = lower_row(row).as_text()
    except Exception as error:
        print("FAILED", row.name, str(error).replace(chr(10), " "))
        continue
    print("LOWERED", "mosaic" * ("@mosaic_gpu" in text), "triton" * ("@__gpu$xla.gpu.triton" in text), row.name)
"""
OLD = jax.__version_info__ < (0, 11)


def named(row):
    """Who serves each part; an older jax may lack what a kernel needs, which the dispatcher then says."""
    found = []
    for expected, choice in zip(row.parts, served.kernels(row), strict=True):
        excused = OLD and f"{expected}: " in choice.reason and " jax 0." in choice.reason
        found.append(expected if excused else choice.name)
    return tuple(found)


def test_the_table_is_small_and_names_each_shape_once():
    names = [row.name for row in served.SERVED]
    assert len(names) <= 40
    assert len(set(names)) == len(names)
    assert {row.model for row in served.SERVED} == set(served.MODELS)


def test_the_table_holds_every_kind_of_step():
    decode = {row.tokens for row in served.SERVED if not row.rows}
    mixed = {row.tokens for row in served.SERVED if row.rows}
    assert decode >= {1, 8, 64, 256} and mixed >= {512, 2048, 8192}
    assert {row.block for row in served.SERVED} >= {16, 64, 128}
    assert {row.dtype for row in served.SERVED} >= {"bfloat16", "float16", "float32"}
    assert {row.pool for row in served.SERVED} >= {"int8", "float8_e4m3fn"}
    sizes = [row.blocks * row.block * served.MODELS[row.model].head_width for row in served.SERVED]
    assert max(sizes) > 1 << 31


@pytest.mark.parametrize("row", served.SERVED, ids=lambda row: row.name)
def test_the_dispatcher_says_what_the_table_says(row):
    assert named(row) == row.parts, served.kernels(row)


def test_a_row_that_differs_is_named_by_what_differs():
    row = served.Row("mosaic", "llama-8b", 64, block=16, pool="int8", numerics="invariant", target="a100")
    assert row.name == "llama-8b decode 64 C16 int8 invariant a100"
    assert row._replace(rows=8).name.startswith("llama-8b mixed 64")


def test_every_row_lowers_for_its_device_without_it():
    """Costs up to a minute, in a process of its own: a plain jax for CPUs, no compiler of a GPU."""
    command = [sys.executable, "-W", "ignore", "-c", LOWER]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    lowered = {}
    for line in done.stdout.splitlines():
        if line.startswith("LOWERED "):
            _, mosaic, triton, name = line.split(" ", 3)
            lowered[name] = {mosaic, triton} - {""}
    told = {row.name: {choice.name for choice in served.kernels(row)} - {"xla"} for row in served.SERVED}
    failed = [line for line in done.stdout.splitlines() if line.startswith("FAILED ")]
    assert not failed, "\n".join(failed)
    assert lowered == told
