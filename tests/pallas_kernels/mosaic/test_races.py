"""The decode kernel has no races; and the watch that says so sees bugs that are planted in its source."""

import importlib.util

import jax
import numpy as np
import pytest

from pallas_kernels.mosaic import decode, decode_program, decode_tiles
from pallas_kernels.target import Target
from tests.pallas_kernels import scenes
from tests.pallas_kernels.mosaic.clocks import products_have_clocks
from tests.pallas_kernels.mosaic.interpreting import interpreted, watched

LENGTHS = [300, 30]


def run(kind=None):
    drawn = scenes.one_token_scene(
        np.random.default_rng(0), lengths=LENGTHS, N=8, K=1, H=64, C=64, dtype="bfloat16"
    )
    q_BNH, k, v, rows, base = drawn
    if kind:
        k, v, *_ = scenes.scaled(k, v, kind)
    options = {"base": base, "scale": 0.2, "window": None, "target": Target("cuda", 90, 1)}
    config = decode.Config(stages=2, resident=1)
    jitted = jax.jit(lambda *arrays: decode.attend(*arrays, **options, config=config))
    return jax.block_until_ready(jitted(q_BNH, k, v, rows.table_BM, np.array(LENGTHS, np.int32)))


@pytest.mark.parametrize("kind", [None, "int8"])
def test_the_kernel_has_no_races(kind):
    with products_have_clocks(), interpreted(races=True):
        assert np.isfinite(run(kind)[0]).all()


def plant(monkeypatch, folder, *changes):
    """Replace (old, new) in the source of the kernel's program, or of its tiles."""
    module = next(module for module in (decode_program, decode_tiles) if changes[0][0] in source(module))
    text = source(module)
    for old, new in changes:
        assert text.count(old) == 1
        text = text.replace(old, new)
    path = folder / "with_bug.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location("with_bug", path)
    changed = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(changed)
    used_by, names = (
        (decode, ["program"]) if module is decode_program else (decode_program, ["add_values", "scores"])
    )
    for name in names:
        monkeypatch.setattr(used_by, name, getattr(changed, name))


def source(module):
    with open(module.__file__) as file:
        return file.read()


FREE = "            pl.when(done + t >= sizes.stages)(lambda free=free: plgpu.barrier_wait(free.at[slot]))\n"
COPY = "            copy(refs, sizes, head, blocks, offset, slot)\n"
KEYS = "    plgpu.barrier_wait(refs.k_here.at[slot])\n"
EARLY = "    plgpu.barrier_arrive(refs.k_free.at[slot])\n"
KEYS_FREE = "        plgpu.barrier_arrive(refs.k_free.at[slot])\n        return scores_sg"
VALUES = "    plgpu.barrier_wait(refs.v_here.at[slot])\n    pl.when"
VALUES_FREE = "    plgpu.barrier_arrive(refs.v_free.at[slot])\n    return added"
COMMIT = "    plgpu.commit_smem()\n"
WEIGHTS = COMMIT + VALUES
CLEANED = "jnp.zeros_like(v_sh))\n" + COMMIT
READ = COMMIT + EARLY


@pytest.mark.parametrize(
    "changes, kind",
    [
        ([(FREE, "")], None),
        ([(KEYS, "")], None),
        ([(KEYS, ""), (KEYS_FREE, "    " + KEYS + KEYS_FREE)], None),
        ([(KEYS_FREE, "        return scores_sg"), (KEYS, KEYS + EARLY)], None),
        ([(VALUES, "    pl.when"), (VALUES_FREE, VALUES.removesuffix("    pl.when") + VALUES_FREE)], None),
        ([(WEIGHTS, VALUES)], None),
        ([(CLEANED, CLEANED.removesuffix(COMMIT))], None),
        ([(READ, READ.removeprefix(COMMIT))], "int8"),
    ],
    ids=[
        "no wait for a free place",
        "no wait for keys",
        "a late wait for keys",
        "keys given back early",
        "a late wait for values",
        "no fence after weights",
        "no fence after zeros",
        "no fence after loads",
    ],
)
def test_a_planted_bug_is_seen(changes, kind, monkeypatch, tmp_path):
    """As a race, or as a barrier that goes on before somebody saw it."""
    plant(monkeypatch, tmp_path, *changes)
    with products_have_clocks(), watched() as race:
        try:
            run(kind)
        except jax.errors.JaxRuntimeError as error:
            assert "observe" in str(error)
        else:
            assert race()


def test_without_clocks_of_products_a_missing_fence_is_not_seen(monkeypatch, tmp_path):
    """When this fails, jax's own interpreter has become able to see it, and `clocks` may go."""
    plant(monkeypatch, tmp_path, (WEIGHTS, VALUES))
    with watched() as race:
        run()
        assert not race()
