"""The Triton kernel for chunks: interpreted against float64, and lowered for CUDA where there is no GPU."""

import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.rows import Rows
from pallas_kernels.shape import Shape
from pallas_kernels.target import H200, Target
from pallas_kernels.triton import chunks
from tests.pallas_kernels import scenes
from tests.pallas_kernels.triton import judging

SPANS = [(0, 5), (0, 0), (0, 1), (60, 10), (63, 1), (20, 50), (64, 64), (1, 15)]
SCALE = 0.2


@functools.partial(jax.jit, static_argnames=("window", "soft_cap", "config"))
def interpreted(q_TNH, k, v, rows, base, sinks_N, *, window=None, soft_cap=None, config=None):
    meaning = {"scale": SCALE, "window": window, "soft_cap": soft_cap, "sinks_N": sinks_N, "config": config}
    return chunks.attend(q_TNH, k, v, rows, base=base, interpret=True, **meaning)


def check(drawn, sinks_N=None, limit=1e-5, config=None, **meaning):
    found = interpreted(*drawn, sinks_N, config=config, **meaning)
    judging.check(found, *drawn, limit=limit, scale=SCALE, sinks_N=sinks_N, **meaning)


@pytest.mark.parametrize(
    "H, N, K, C, dtype, sinks, meaning",
    [
        (32, 4, 2, 16, "float32", False, {}),
        (64, 1, 1, 32, "float32", False, {"window": 20}),
        (80, 6, 2, 64, "float32", True, {"soft_cap": 3.0}),
        (96, 20, 1, 128, "float32", True, {"window": 64}),
        (128, 14, 2, 16, "bfloat16", False, {"soft_cap": 3.0}),
        (256, 4, 2, 64, "bfloat16", True, {}),
        (64, 8, 1, 128, "float16", False, {}),
    ],
)
def test_the_interpreted_kernel_agrees_with_float64(H, N, K, C, dtype, sinks, meaning):
    rng = np.random.default_rng(H)
    drawn = scenes.scene(rng, spans=SPANS, N=N, K=K, H=H, C=C, dtype=dtype, padding=(7, 2))
    check(drawn, judging.draw_sinks(rng, N) if sinks else None, judging.LIMIT[dtype], **meaning)


@pytest.mark.parametrize(
    "kind, dtype, limit",
    [("int8", "float32", 1e-5), ("int8", "bfloat16", 1e-2), ("float8_e4m3fn", "bfloat16", 1e-2)],
)
def test_8_bit_pools_agree_with_the_numbers_they_stand_for(kind, dtype, limit):
    rng = np.random.default_rng(2)
    q_TNH, k_PKCH, v_PKCH, rows, base = scenes.scene(rng, spans=SPANS, N=6, K=2, H=80, C=64, dtype=dtype)
    k, v, k_meant_PKCH, v_meant_PKCH = scenes.scaled(k_PKCH, v_PKCH, kind)
    found = interpreted(q_TNH, k, v, rows, base, None)
    judging.check(found, q_TNH, k_meant_PKCH, v_meant_PKCH, rows, base, limit=limit, scale=SCALE)
    if kind == "int8":
        judging.check(found, q_TNH, k_PKCH, v_PKCH, rows, base, limit=judging.INT8_LIMIT, scale=SCALE)


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    spans=st.lists(st.tuples(st.integers(0, 70), st.integers(0, 20)), min_size=4, max_size=4),
)
def test_any_spans_agree_with_float64(seed, spans):
    tokens = sum(count for _, count in spans)
    if not tokens:
        return
    sizes = {"N": 3, "K": 1, "H": 32, "C": 16, "num_blocks": 30, "columns": 6, "padding": (80 - tokens, 0)}
    drawn = scenes.scene(np.random.default_rng(seed), spans=spans, **sizes)
    check(drawn, config=chunks.Config(rows=16, tile=16), window=30)


@settings(max_examples=50, deadline=None)
@given(counts=st.lists(st.integers(0, 40), min_size=6, max_size=6), tokens=st.sampled_from([1, 3, 16]))
def test_every_token_is_in_one_query_tile_and_rows_are_listed_from_their_ends(counts, tokens):
    rows = Rows(None, None, np.array(counts, np.int32), None)
    work = jax.jit(chunks.list_work, static_argnums=(1, 2))(rows, 240, tokens)
    expected = [(row, at) for row, count in enumerate(counts) for at in reversed(range(0, count, tokens))]
    row_W, within_W = (np.asarray(part).tolist() for part in work)
    assert list(zip(row_W, within_W, strict=True))[: len(expected)] == expected
    assert set(row_W[len(expected) :]) <= {-1}


def test_the_list_has_room_for_the_worst_case_and_no_more():
    rows = Rows(None, None, np.array([1, 9, 1, 9], np.int32), None)  # 4 rows, a tile of 8 each and one token over
    assert np.asarray(chunks.list_work(rows, 20, 8).row_W).tolist() == [0, 1, 1, 2, 3, 3]


def test_a_query_tile_writes_no_tokens_but_its_own():
    *pools, rows, base = scenes.scene(np.random.default_rng(5), spans=[(3, 5), (7, 6)], N=4, K=2, H=32, C=16)
    later_first = Rows(*(part[::-1] for part in rows))  # what is done last has places before what is done first
    check((*pools, later_first, base))


@pytest.mark.parametrize("H, arch, tile", [(128, 80, 64), (256, 80, 64), (256, 89, 32), (256, 120, 32)])
def test_tiles_fit_the_shared_memory_of_the_target(H, arch, tile):
    q_TNH, k_PKCH = jax.ShapeDtypeStruct((9, 32, H), "bfloat16"), jax.ShapeDtypeStruct((9, 8, 64, H), "bfloat16")
    assert chunks.rule(Target("cuda", arch), q_TNH, k_PKCH, plain=True).tile == tile


def test_two_rows_may_share_blocks():
    q_TNH, k_PKCH, v_PKCH, rows, base = scenes.scene(
        np.random.default_rng(4), spans=[(64, 20), (70, 9)], N=4, K=2, H=32, C=16
    )
    rows.table_BM[1, :4] = rows.table_BM[0, :4]
    check((q_TNH, k_PKCH, v_PKCH, rows, base))


def test_what_the_kernel_cannot_serve_is_named():
    assert chunks.unserved(H200, Shape(4, 128, 64, "bfloat16", "int8")) is None
    assert "48" in chunks.unserved(H200, Shape(4, 128, 48, "bfloat16", "int8"))


def test_the_kernel_lowers_for_cuda_on_a_machine_without_a_gpu():
    judging.check_lowering("chunks")
