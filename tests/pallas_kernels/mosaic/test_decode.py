"""The decode kernel, interpreted, against float64; NaN in every place that nobody may look at."""

import functools

import jax
import numpy as np
import pytest

from pallas_kernels.mosaic import decode, merge
from pallas_kernels.shape import Shape
from pallas_kernels.target import CPU, H200, Target
from tests.pallas_kernels import ref64, scenes
from tests.pallas_kernels.mosaic.interpreting import interpreted

EDGES = [0, 1, 15, 16, 63, 64, 65, 150]
SOME = [0, 1, 64, 65, 150]
FEW = {"stages": 2, "resident": 1}


@pytest.fixture(autouse=True)
def one_warpgroup_merges(monkeypatch):
    """However few rows there are: four, which `test_merge` sees, take four times as long to interpret."""
    monkeypatch.setattr(merge, "FEW", 0)


@functools.partial(jax.jit, static_argnames=("options", "cores"))
def attend(q_BNH, k, v, table_BM, lengths_B, base, sinks_N, *, options, cores):
    target = Target("cuda", 90, cores, "few multiprocessors")
    return decode.attend(
        q_BNH, k, v, table_BM, lengths_B, base=base, sinks_N=sinks_N, target=target, **dict(options)
    )


def run(drawn, k, v, lengths, *, sinks_N=None, cores=4, fixed=None, **options):
    """Outputs and masses of rows of `lengths` of a step drawn by `scenes`."""
    q_BNH, _, _, rows, base = drawn
    options = {**options, "config": decode.Config(**FEW, fixed=fixed)}
    arrays = (q_BNH, k, v, rows.table_BM, np.array(lengths, np.int32), base, sinks_N)
    with interpreted():
        return [np.asarray(part) for part in attend(*arrays, options=tuple(options.items()), cores=cores)]


def expect_close(found, drawn, numbers, limit, **options):
    """Outputs within `limit` of float64 over `numbers`, keys and values, and masses as near as float32 allows."""
    q_BNH, _, _, rows, base = drawn
    o_BNH, lse_BN = ref64.attention_with_lse(q_BNH, *numbers, rows, base=base, **options)
    assert scenes.relative_error(found[0], o_BNH) <= limit
    live_B = rows.count_B > 0
    assert np.abs(found[1][live_B] - lse_BN[live_B]).max() <= 1e-5
    assert (found[1][~live_B] == -np.inf).all()


@pytest.mark.parametrize(
    "lengths, shape, options",
    [
        (SOME, {"N": 4, "K": 2, "H": 128, "C": 64}, {}),
        (EDGES, {"N": 8, "K": 1, "H": 64, "C": 16}, {"window": 20}),
        ([150, 33], {"N": 3, "K": 3, "H": 64, "C": 32, "dtype": "float16"}, {"soft_cap": 2.0}),
        ([150, 64], {"N": 6, "K": 2, "H": 80, "C": 16}, {"window": 70, "sinks": True}),
        ([200, 0, 129], {"N": 5, "K": 1, "H": 96, "C": 128, "dtype": "float16"}, {"window": 64}),
        ([130], {"N": 16, "K": 1, "H": 256, "C": 64}, {"sinks": True, "soft_cap": 5.0}),
        ([70, 3], {"N": 14, "K": 2, "H": 64, "C": 64}, {}),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else None,
)
def test_the_interpreted_kernel_agrees_with_float64(lengths, shape, options):
    rng = np.random.default_rng(0)
    drawn = scenes.one_token_scene(rng, lengths=lengths, **{"dtype": "bfloat16", **shape})
    sinks_N = rng.normal(size=shape["N"]).astype(np.float32) if options.pop("sinks", False) else None
    options = {"window": None, "scale": 0.2, "soft_cap": None, **options}
    found = run(drawn, *drawn[1:3], lengths, sinks_N=sinks_N, **options)
    expect_close(found, drawn, drawn[1:3], 1e-2, sinks_N=sinks_N, **options)


@pytest.mark.parametrize(
    "kind, lengths, shape, options",
    [
        ("int8", SOME, {"N": 4, "K": 2, "H": 128, "C": 64}, {}),
        ("int8", [0, 190, 64], {"N": 9, "K": 1, "H": 64, "C": 128}, {"window": 70}),
        ("float8_e4m3fn", [150, 1, 64], {"N": 4, "K": 2, "H": 64, "C": 64}, {"window": 90, "soft_cap": 4.0}),
    ],
)
def test_keys_and_values_of_8_bits_agree_with_what_they_stand_for(kind, lengths, shape, options):
    drawn = scenes.one_token_scene(np.random.default_rng(1), lengths=lengths, dtype="bfloat16", **shape)
    k, v, *numbers = scenes.scaled(*drawn[1:3], kind)
    options = {"window": None, "scale": 0.1, "soft_cap": None, **options}
    found = run(drawn, k, v, lengths, **options)
    expect_close(found, drawn, numbers, 1e-2, **options)
    if kind == "int8":
        o_BNH = ref64.attention(drawn[0], *drawn[1:3], drawn[3], base=drawn[4], **options)
        assert scenes.relative_error(found[0], o_BNH) <= 3e-2


def test_rows_that_share_blocks_agree_with_float64():
    lengths, few = [140, 70, 129], {"N": 2, "K": 1, "H": 64, "C": 64, "dtype": "bfloat16"}
    drawn = scenes.one_token_scene(np.random.default_rng(2), lengths=lengths, **few)
    table_BM = drawn[3].table_BM.copy()
    table_BM[1, :2], table_BM[2, :2] = table_BM[0, :2], table_BM[0, :2][::-1]
    drawn = (*drawn[:3], drawn[3]._replace(table_BM=table_BM), drawn[4])
    options = {"window": None, "scale": 0.2, "soft_cap": None}
    expect_close(run(drawn, *drawn[1:3], lengths, **options), drawn, drawn[1:3], 1e-2, **options)


def test_bits_of_a_row_in_items_of_fixed_size_do_not_depend_on_its_batch(monkeypatch):
    monkeypatch.setattr(merge, "FEW", 2)  # three rows are many
    lengths, few = [300, 0, 500], {"N": 2, "K": 1, "H": 64, "C": 64, "dtype": "bfloat16"}
    q_BNH, k, v, rows, base = scenes.one_token_scene(np.random.default_rng(3), lengths=lengths, **few)
    options = {"window": None, "scale": 0.2, "fixed": 2}
    together = run((q_BNH, k, v, rows, base), k, v, lengths, cores=5, **options)
    alone = (q_BNH[2:], k, v, rows._replace(table_BM=rows.table_BM[2:]), base)
    apart = run(alone, k, v, lengths[2:], cores=3, **options)
    assert all(np.array_equal(a[2], b[0]) for a, b in zip(together, apart, strict=True))


SERVED = Shape(group=4, head_width=128, block=64, dtype="bfloat16", pool_dtype="bfloat16")


@pytest.mark.parametrize(
    "change, words",
    [
        ({}, None),
        ({"head_width": 80, "block": 16, "dtype": "float16", "pool_dtype": "float16"}, None),
        ({"pool_dtype": "int8", "block": 128}, None),
        ({"dtype": "float32", "pool_dtype": "float32"}, "queries of float32 would be rounded"),
        ({"pool_dtype": "float16"}, "pools of float16 do not go with queries of bfloat16"),
        ({"head_width": 72}, "head width 72 is no multiple of 16"),
        ({"head_width": 32}, "head width 32 is no multiple of 16 from 64"),
        ({"block": 48}, "blocks of 48 positions do not fit tiles of 64"),
        ({"group": 48}, "48 query heads share a kv head"),
        ({"pool_dtype": "int8", "block": 32}, "blocks of 32 positions of 8 bits"),
        ({"pool_dtype": "int8", "head_width": 96}, "head width 96 of 8-bit numbers"),
    ],
)
def test_what_is_not_served_is_said_in_words(change, words):
    said = decode.unserved(H200, SERVED._replace(**change))
    assert said is None if words is None else words in said


def test_other_devices_are_not_served():
    assert all(decode.unserved(target, SERVED) for target in (CPU, Target("cuda", 80), Target("cuda", 100)))


@pytest.mark.parametrize("pool_dtype", ["bfloat16", "int8", "float8_e4m3fn"])
def test_what_the_rule_gives_fits_a_multiprocessor(pool_dtype):
    for group in (1, 4, 8, 16, 32):
        for width in (64, 80, 96, 128, 256):
            shape = SERVED._replace(group=group, head_width=width, pool_dtype=pool_dtype)
            config = decode.rule(H200, shape)
            stage = 2 * 64 * width * (2 if pool_dtype == "bfloat16" else 1)
            assert config.stages >= 2
            assert config.resident * config.stages * stage <= 227 * 1024
    assert decode.rule(H200, SERVED) == decode.Config(3, 2)
