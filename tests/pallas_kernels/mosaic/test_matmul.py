"""The Mosaic product with 4-bit weights, interpreted: equal to float64, no races, and planted bugs are seen."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.mosaic import matmul as mosaic
from pallas_kernels.quantised import quantise
from pallas_kernels.target import H200
from tests.pallas_kernels.mosaic.clocks import products_have_clocks
from tests.pallas_kernels.mosaic.interpreting import interpreted, watched
from tests.pallas_kernels.weights64 import drawn, stands_for


def error(kernel, config, T, D, X, dtype=jnp.bfloat16):
    """The largest error of an interpreted product, of its largest number."""
    x_TD, w_DX = drawn(T, D, X, seed=T)
    x_TD, w = jnp.asarray(x_TD, dtype), quantise(jnp.asarray(w_DX), "int4")
    assert kernel.unserved(H200, x_TD, w) is None
    got_TX = np.asarray(jax.jit(lambda x_TD, w: kernel.matmul(x_TD, w, config=config))(x_TD, w))
    want_TX = np.asarray(x_TD, np.float64) @ stands_for(w)
    assert got_TX.shape == (T, X) and got_TX.dtype == np.float32
    return np.abs(got_TX - want_TX).max() / np.abs(want_TX).max()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_programs_share_tiles_of_columns_and_leave_no_step_out(dtype):
    """Six steps in three tiles for four programs: shares of one and two steps, one of them across two tiles."""
    with interpreted():
        assert error(mosaic, mosaic.Config(consumers=1, stages=1, programs=4), 3, 512, 192, dtype) < 1e-6


def test_several_consumers_and_tiles_of_tokens_each_do_their_own():
    with interpreted():
        assert error(mosaic, mosaic.Config(consumers=2, stages=2, programs=1), 72, 256, 128) < 1e-6


def test_the_kernel_has_no_races():
    with products_have_clocks(), interpreted(races=True):
        assert error(mosaic, mosaic.Config(consumers=2, stages=2, programs=1), 8, 1024, 128) < 1e-6


HERE = "    plgpu.barrier_wait(refs.here.at[slot])\n"
FREE = "        pl.when(n - begin >= sizes.stages)(lambda: plgpu.barrier_wait(refs.free.at[slot]))\n"
FENCE = "    plgpu.commit_smem()  # loads and TMA reach shared memory by two ways, which a fence puts in order\n"
GIVEN_BACK = "    plgpu.barrier_arrive(refs.free.at[slot])\n"
LOADED = "for place in range(PLACES)]\n"


@pytest.mark.parametrize(
    "changes",
    [
        {FREE: ""},
        {HERE: ""},
        {FENCE: ""},
        {FENCE: "", GIVEN_BACK: "", LOADED: LOADED + FENCE + GIVEN_BACK},
    ],
    ids=[
        "no wait for a free place",
        "no wait for a tile",
        "no fence after loads",
        "given back before the products",
    ],
)
def test_a_planted_bug_is_seen(changes, tmp_path):
    """As a race, or as a barrier that goes on before somebody saw it."""
    text = Path(mosaic.__file__).read_text()
    for old, new in changes.items():
        assert text.count(old) == 1
        text = text.replace(old, new)
    (tmp_path / "with_bug.py").write_text(text)
    spec = importlib.util.spec_from_file_location("with_bug", tmp_path / "with_bug.py")
    kernel = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kernel)
    with products_have_clocks(), watched() as race:
        try:
            error(kernel, kernel.Config(consumers=1, stages=1, programs=1), 8, 768, 64)
        except jax.errors.JaxRuntimeError as raised:
            assert "observe" in str(raised)
        else:
            assert race()
