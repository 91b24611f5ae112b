"""The Mosaic kernel of chunks, interpreted: ragged rows, masks, poisoned blocks, races, planted bugs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.mosaic import chunks
from pallas_kernels.mosaic.chunks import Config
from pallas_kernels.shape import Shape
from pallas_kernels.target import CPU, H200
from tests.pallas_kernels import ref64, scenes
from tests.pallas_kernels.mosaic.interpreting import interpreted, watched

SMALL = H200._replace(cores=2)  # two blocks of threads, so that each serves several items
LIMIT = 1e-2
SPANS = [(0, 17), (5, 1), (0, 0), (30, 70), (63, 2), (0, 64)]


def attend(drawn, *, scale=0.2, window=None, soft_cap=None, sinks_N=None, config=None):
    """Outputs and masses of the tokens that belong to a row; call it under interpretation."""
    q_TNH, k_PKCH, v_PKCH, rows, base = jax.tree.map(jnp.asarray, drawn)
    shared = {"scale": scale, "window": window, "soft_cap": soft_cap, "target": SMALL, "config": config}
    step = jax.jit(functools.partial(chunks.attend, **shared))  # a traced base, as in a loop over layers
    results = step(q_TNH, k_PKCH, v_PKCH, rows, base=base, sinks_N=sinks_N)
    return [np.asarray(x, np.float64)[: drawn[3].count_B.sum()] for x in results]


def check(drawn, races=False, **options):
    with interpreted(races):
        o_TNH, lse_TN = attend(drawn, **options)
    options = {"scale": 0.2, "window": None, **options}
    options.pop("config", None)
    q_TNH, k_PKCH, v_PKCH, rows, base = drawn
    ref_TNH, ref_TN = ref64.attention_with_lse(q_TNH, k_PKCH, v_PKCH, rows, base=base, **options)
    assert scenes.relative_error(o_TNH, ref_TNH[: len(o_TNH)]) <= LIMIT
    assert np.abs(lse_TN - ref_TN[: len(lse_TN)]).max() <= 1e-3


def draw(seed, spans=SPANS, N=2, K=1, H=64, C=16, dtype="bfloat16", **shape):
    return scenes.scene(np.random.default_rng(seed), spans=spans, N=N, K=K, H=H, C=C, dtype=dtype, **shape)


def test_rows_of_any_count_agree_with_float64():
    check(draw(0, padding=(9, 2)), config=Config(tile=64, stages=2, heads=2))


def test_a_window_a_cap_and_sinks_agree_with_float64():
    sinks_N = np.array([0.5, -1.0], np.float32)
    check(draw(1), config=Config(128, 2, 2), window=40, soft_cap=3.0, sinks_N=sinks_N)


@pytest.mark.parametrize(
    "N, K, H, C, dtype, config",
    [
        (1, 1, 128, 64, "bfloat16", Config(128, 2, 1)),  # both consumers have the same head
        (3, 1, 64, 32, "float16", Config(64, 3, 4)),  # a head too many
        (6, 2, 64, 128, "bfloat16", Config(64, 2, 2)),  # two tiles of heads, blocks longer than tiles
        (1, 1, 80, 16, "bfloat16", Config(64, 2, 1)),  # outputs lie apart
    ],
)
def test_every_grouping_and_width_agrees_with_float64(N, K, H, C, dtype, config):
    check(draw(2, [(70, 64), (0, 3)], N, K, H, C, dtype), config=config)


def test_a_step_shorter_than_a_tile_agrees_with_float64():
    check(draw(3, [(40, 3)]))


def test_rows_may_share_blocks():
    q_TNH, k_PKCH, v_PKCH, rows, base = draw(4, [(20, 20), (39, 1)])
    table_BM = rows.table_BM.copy()
    table_BM[1, :2] = table_BM[0, :2]
    check((q_TNH, k_PKCH, v_PKCH, rows._replace(table_BM=table_BM), base))


def test_blocks_before_the_window_are_never_followed():
    q_TNH, k_PKCH, v_PKCH, rows, base = draw(5, [(150, 20)])
    for m in range((150 - 39) // 16):
        k_PKCH[base + rows.table_BM[0, m]] = v_PKCH[base + rows.table_BM[0, m]] = np.nan
        rows.table_BM[0, m] = -(2**31)
    for config in (Config(64, 2, 2), Config(64, 2, 2, ordered=True)):
        check((q_TNH, k_PKCH, v_PKCH, rows, base), window=40, config=config)


def test_no_two_accesses_race():
    check(draw(6, [(50, 20), (0, 90)]), races=True, config=Config(64, 2, 2), window=40)


@pytest.mark.parametrize("barrier", [None, "k_here", "v_free", "q_free", "turns"])
def test_a_wait_that_is_left_out_is_noticed(monkeypatch, barrier):
    """By a race, a phase that nobody saw, or a wrong result: the tests above would fail."""
    wait, make, made = chunks.plgpu.barrier_wait, chunks.Refs, []

    def remember(*refs):
        made.append(make(*refs))
        return made[-1]

    def wait_for_others(ref):
        if barrier is None or getattr(ref, "ref", ref) is not getattr(made[-1], barrier):
            wait(ref)

    monkeypatch.setattr(chunks, "Refs", remember)
    monkeypatch.setattr(chunks.plgpu, "barrier_wait", wait_for_others)
    drawn = draw(7, [(150, 40), (100, 20)], N=2)
    noticed = False
    try:
        with watched() as race:
            o_TNH, _ = attend(drawn, config=Config(64, 2, 1))
            jax.effects_barrier()
            noticed = race()
    except Exception as error:
        noticed = "barrier" in str(error).lower()
    if not noticed:
        ref_TNH = ref64.attention(*drawn[:4], base=drawn[4], scale=0.2, window=None)
        noticed = not scenes.relative_error(o_TNH, ref_TNH) <= LIMIT
    assert noticed == (barrier is not None)


def test_what_is_not_served_is_told_in_words():
    shape = Shape(4, 128, 64, "bfloat16", "bfloat16")
    assert chunks.unserved(H200, shape) is None
    told = [
        chunks.unserved(CPU, shape),
        chunks.unserved(H200, shape._replace(pool_dtype="int8")),
        chunks.unserved(H200, shape._replace(head_width=72)),
        chunks.unserved(H200, shape._replace(block=48)),
    ]
    words = ["compute capability 9.0", "pools of int8", "head width 72", "blocks of 48"]
    assert all(word in sentence for word, sentence in zip(words, told, strict=True))
    with pytest.raises(ValueError, match="head width 32"):
        attend(draw(8, [(0, 1)], H=32))


@pytest.mark.parametrize("H", chunks.HEAD_WIDTHS)
@pytest.mark.parametrize("G", [1, 3, 4, 5, 7, 8, 12, 24])
def test_the_rule_fits_shared_memory_and_fills_tiles(G, H):
    shape = Shape(G, H, 64, "bfloat16", "bfloat16")
    for tokens, ordered in ((8192, False), (8, False), (8, True)):
        tile, stages, heads, _ = chunks.rule(shape, tokens, 4, ordered)
        shared = 4 * tile * H * stages + 2 * 64 * 2 * (H + chunks.out_width(H))
        assert stages >= 2 and shared <= 232448 - 4096
        assert heads in (1, 2, 4, 8, 16) and (tokens < 100 or G % heads == 0 or 7 * heads <= 8 * G)
