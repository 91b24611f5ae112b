"""The XLA path against float64: every head width, ragged rows, windows, poisoned blocks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import dispatch, reference
from tests.pallas_kernels import ref64, scenes

LIMIT = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 1e-2}


STATIC = ("scale", "window", "soft_cap", "one_token", "numerics")


@functools.partial(jax.jit, static_argnames=STATIC)
def served(q_TNH, k, v, rows, base, *, numerics="fast", **options):
    return dispatch.attention_with_lse(q_TNH, k, v, rows, base=base, numerics=numerics, **options)


def error(drawn, *, pools=None, **options):
    """Of the outputs; those of the masses must be within it too. `pools` are judged by the drawn numbers."""
    q_TNH, k_PKCH, v_PKCH, rows, base = drawn
    numbers = {"scale": q_TNH.shape[-1] ** -0.5, "window": None, **options}
    pools = pools or [scenes.stored(pool) for pool in (k_PKCH, v_PKCH)]
    o_TNH, lse_TN = served(q_TNH, *pools, rows, base, **{"one_token": False, **numbers})
    judged = {name: numbers.get(name) for name in ("scale", "window", "soft_cap", "sinks_N")}
    ref_TNH, ref_TN = ref64.attention_with_lse(q_TNH, k_PKCH, v_PKCH, rows, base=base, **judged)
    assert o_TNH.dtype == lse_TN.dtype == jnp.float32
    off = scenes.relative_error(o_TNH, ref_TNH)
    with np.errstate(invalid="ignore"):
        apart_TN = np.where(np.isinf(ref_TN), lse_TN != ref_TN, np.abs(np.asarray(lse_TN) - ref_TN))
    assert apart_TN.max() <= max(off, 1e-5) * 4
    return off


CASES = pytest.mark.parametrize(
    "dtype, window", [("float32", None), ("float32", 1), ("float32", 20), ("bfloat16", None), ("float16", 20)]
)


@CASES
def test_one_token_rows_of_any_length_agree_with_float64(dtype, window):
    rng = np.random.default_rng(1)
    lengths = [0, 1, 15, 16, 17, 63, 64, 65, 0, 130, 700, 3, 333]  # more tiles than a group holds
    drawn = scenes.one_token_scene(rng, lengths=lengths, N=4, K=2, H=32, C=16, dtype=dtype)
    assert error(drawn, window=window, one_token=True) <= LIMIT[dtype]


@CASES
def test_chunks_with_a_prefix_beside_single_tokens_agree_with_float64(dtype, window):
    rng = np.random.default_rng(2)
    spans = [(0, 70), (40, 1), (100, 30), (0, 1), (15, 2), (128, 17)]
    drawn = scenes.scene(rng, spans=spans, N=4, K=2, H=32, C=16, dtype=dtype, padding=(9, 2))
    assert error(drawn, window=window) <= LIMIT[dtype]


@pytest.mark.parametrize(
    "N, K, H, C",
    [(1, 1, 32, 16), (8, 1, 80, 32), (3, 3, 96, 16), (4, 2, 128, 64), (6, 2, 256, 128), (16, 2, 64, 64)],
)
def test_every_head_width_and_grouping_agrees_with_float64(N, K, H, C):
    rng = np.random.default_rng(3)
    shape = {"N": N, "K": K, "H": H, "C": C}
    assert error(scenes.scene(rng, spans=[(140, 5), (149, 1), (2, 1), (0, 12)], **shape)) <= 1e-5


@pytest.mark.parametrize("numerics", ["fast", "invariant"])
@pytest.mark.parametrize("one_token", [False, True])
def test_caps_and_sinks_agree_with_float64(numerics, one_token):
    rng = np.random.default_rng(7)
    shape = {"N": 4, "K": 2, "H": 32, "C": 16}
    spans = [(0, 20), (64, 1), (100, 30), (3, 1)]
    drawn = (
        scenes.one_token_scene(rng, lengths=[0, 1, 70, 129], **shape)
        if one_token
        else scenes.scene(rng, spans=spans, padding=(5, 1), **shape)
    )
    options = {"soft_cap": 1.5, "sinks_N": np.array([-1, 0.5, 9, 2], np.float32)}
    assert error(drawn, one_token=one_token, numerics=numerics, **options) <= 1e-5
    assert error(drawn, one_token=one_token, numerics=numerics, window=30, **options) <= 1e-5


@pytest.mark.parametrize("kind", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize("numerics", ["fast", "invariant"])
@pytest.mark.parametrize("C", [16, 64, 128])
def test_pools_of_8_bits_agree_with_the_numbers_they_stand_for(kind, numerics, C):
    rng = np.random.default_rng(8)
    shape = {"N": 4, "K": 2, "H": 32, "C": C}
    drawn = scenes.scene(rng, spans=[(0, 20), (64, 1), (100, 30), (3, 1)], padding=(5, 1), **shape)
    q_TNH, k_PKCH, v_PKCH, rows, base = drawn
    keys, values, *meant = scenes.scaled(k_PKCH, v_PKCH, kind)
    assert error((q_TNH, *meant, rows, base), pools=(keys, values), numerics=numerics) <= 1e-5
    # float8_e4m3fn keeps 4 significant bits: a row of one position is off by up to 1 / 16.
    assert error(drawn, pools=(keys, values), numerics=numerics) <= (3e-2 if kind == "int8" else 1e-1)


def test_parts_of_a_row_merge_by_their_masses():
    """Two halves of the positions, each as a row of its own, are the whole row."""
    drawn = scenes.one_token_scene(np.random.default_rng(9), lengths=[128], N=4, K=2, H=32, C=16)
    q_TNH, k_PKCH, v_PKCH, rows, base = drawn
    options = {"scale": 0.2, "window": None, "one_token": True}
    whole_TNH, whole_TN = served(q_TNH, k_PKCH, v_PKCH, rows, base, **options)
    halves = [rows.table_BM[:, :4], rows.table_BM[:, 4:8]]
    cut = [rows._replace(start_B=np.array([63], np.int32), table_BM=table_BM) for table_BM in halves]
    (a_TNH, a_TN), (b_TNH, b_TN) = (served(q_TNH, k_PKCH, v_PKCH, part, base, **options) for part in cut)
    np.testing.assert_allclose(jnp.logaddexp(a_TN, b_TN), whole_TN, rtol=1e-5)
    share_TN = jnp.exp(a_TN - whole_TN)[..., None]
    np.testing.assert_allclose(a_TNH * share_TN + b_TNH * (1 - share_TN), whole_TNH, rtol=1e-4, atol=1e-6)


def test_rows_may_share_blocks():
    rng = np.random.default_rng(4)
    q_TNH, k_PKCH, v_PKCH, rows, base = scenes.one_token_scene(rng, lengths=[40, 40, 37], N=4, K=2, H=32, C=16)
    table_BM = rows.table_BM.copy()
    table_BM[1:, :2] = table_BM[0, :2]
    assert error((q_TNH, k_PKCH, v_PKCH, rows._replace(table_BM=table_BM), base), one_token=True) <= 1e-5


def test_a_step_of_padding_alone_gives_zeros():
    rng = np.random.default_rng(5)
    assert error(scenes.scene(rng, spans=[(0, 0)], N=4, K=2, H=32, C=16, padding=(4, 3))) == 0


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_random_steps_agree_with_float64(data):
    """Two shapes, padded to one size each, so that there are two compilations."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1), label="seed"))
    K, G, C, window = data.draw(st.sampled_from([(2, 3, 48, None), (1, 2, 16, 17)]), label="K, G, C, window")
    counts = st.sampled_from([0, 1, 1, 2, 7, 40, 90])
    spans = data.draw(st.lists(st.tuples(st.integers(0, 150), counts), min_size=1, max_size=4), label="spans")
    padding = (360 - sum(count for _, count in spans), 4 - len(spans))
    q_TNH, k_PKCH, v_PKCH, rows, base = scenes.scene(
        rng, spans=spans, N=K * G, K=K, H=32, C=C, padding=padding, num_blocks=80, columns=16
    )
    assert error((q_TNH, k_PKCH, v_PKCH, rows, base), window=window) <= 1e-5


def test_the_reference_agrees_with_float64(monkeypatch):
    def slow(q_TNH, k, v, rows, base, *, one_token, **options):
        arrays = jax.tree.map(jnp.asarray, (q_TNH, k, v, rows))
        return reference.attend(*arrays, base=base, **{"soft_cap": None, "sinks_N": None, **options})

    monkeypatch.setitem(globals(), "served", slow)
    rng = np.random.default_rng(6)
    drawn = scenes.scene(rng, spans=[(0, 20), (31, 1), (30, 9)], N=4, K=2, H=32, C=16, padding=(3, 1))
    assert error(drawn, window=9) <= 1e-5
    assert error(drawn, soft_cap=2.0, sinks_N=jnp.arange(4.0)) <= 1e-5
    keys, values, *meant = scenes.scaled(*drawn[1:3], "int8")
    assert error((drawn[0], *meant, *drawn[3:]), pools=jax.tree.map(jnp.asarray, (keys, values))) <= 1e-5


@pytest.mark.parametrize("one_token, kind", [(True, "float32"), (False, "uint16")])
def test_the_pool_is_never_copied(one_token, kind):
    P, K, C, H, T, B = 4096, 2, 16, 32, 8, 8
    pool = jax.ShapeDtypeStruct((P, K, C, H), kind)
    integers = [jax.ShapeDtypeStruct((B,), "int32")] * 3 + [jax.ShapeDtypeStruct((B, 16), "int32")]
    q_TNH = jax.ShapeDtypeStruct((T, 4, H), "float32")
    compiled = served.lower(
        q_TNH, pool, pool, dispatch.Rows(*integers), 0, scale=0.1, window=None, one_token=one_token
    ).compile()
    pool_bytes = P * K * C * H * np.dtype(kind).itemsize
    assert compiled.memory_analysis().temp_size_in_bytes < pool_bytes / 4
    made = [
        line
        for line in compiled.as_text().splitlines()
        if f" = {'f32' if kind == 'float32' else 'u16'}[{P}," in line
    ]
    assert all(" parameter(" in line or " get-tuple-element(" in line for line in made), made
    assert f"bf16[{P}," not in compiled.as_text()
