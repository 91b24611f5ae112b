import json
import secrets
import sys
from collections import namedtuple
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bench import kernels, kernels_child, kernels_loads, kernels_parts
from bench.kernels_cases import (
    CHOSEN,
    DECODE_GOALS,
    KIB,
    LLAMA_8B,
    PREFILL_GOALS,
    RATIOS,
    Decode,
    Goal,
    Prefill,
    cases,
    goal,
    small_cases,
)
from bench.kernels_check import check, decode_spans, mixed_spans, shrunk
from bench.kernels_judge import judged, missed, ratios, tables
from bench.kernels_parts import Around
from bench.kernels_process import Job, Limits, run, surroundings
from bench.kernels_scenes import judged as judged_scene
from bench.kernels_scenes import timed_pools, timed_table
from bench.kernels_serve import names, shape_of
from bench.kernels_speed import fitting, label, plan, rows_of
from bench.kernels_step import launches
from bench.kernels_time import NoiseError, chain, chains, slope
from pallas_kernels import served
from pallas_kernels.dispatch import KERNELS
from pallas_kernels.target import CPU, H200
from pallas_kernels.xla import chunks as xla_chunks
from pallas_kernels.xla import ordered as xla_ordered

# --- processes ---------------------------------------------------------------------------------------------------

SCRIPT = """
import json, os, sys, time
sys.path.insert(0, "")
from bench.kernels_process import tell
for job in json.loads(sys.argv[1])["jobs"]:
    tell(job=job, began=True)
    if job[1] == "aborts":
        print("LLVM ERROR: cannot select", file=sys.stderr, flush=True)
        os.abort()
    if job[1] == "sleeps":
        time.sleep(60)
    tell(job=job, row={"us": 1.0})
    if job[1] == "dies later":
        os._exit(3)
    tell(job=job, done=True)
"""

MINUTE = Limits(60)


def doing(*names, limits=MINUTE, script=SCRIPT):
    told = []
    rows = run([Job("speed", name) for name in names], {}, limits, told.append, (sys.executable, "-c", script))
    assert told == rows
    return rows


def test_what_breaks_its_process_loses_its_own_row_alone():
    rows = doing("one", "aborts", "two", "dies later", "three")
    assert [row["case"] for row in rows] == ["one", "aborts", "two", "dies later", "dies later", "three"]
    assert ["us" in row for row in rows] == [True, False, True, True, False, True]
    assert rows[1]["error"] == "LLVM ERROR: cannot select"
    assert rows[4]["error"] == "its process ended without a word"


def test_who_says_nothing_is_ended():
    rows = doing("one", "sleeps", "two", limits=Limits(60, patience_s=2))
    assert ["us" in row for row in rows] == [True, False, True]
    assert "said nothing for 2 s" in rows[1]["error"]


def test_what_time_does_not_reach_says_so():
    rows = doing("sleeps", "two", limits=Limits(2))
    assert "error" in rows[0] and rows[1]["skipped"] == "no time was left"


def test_a_process_that_cannot_start_gives_every_job_its_error():
    rows = doing("one", "two", script="import nothing_of_that_name")
    assert [row["error"] for row in rows] == ["ModuleNotFoundError: No module named 'nothing_of_that_name'"] * 2


def test_a_process_finds_this_code_and_what_else_is_on_the_path(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    places = surroundings({"A": "b"})
    assert places["PYTHONPATH"].split(":")[1:] == ["/somewhere"] and places["A"] == "b"
    monkeypatch.delenv("PYTHONPATH")
    assert ":" not in surroundings({})["PYTHONPATH"]


def test_a_child_goes_on_after_what_leaves_the_device_whole(capsys):
    jobs = [["speed", "decode of nobody"], ["nonsense", "x"], ["facts", "device"]]
    assert kernels_child.main([json.dumps({"jobs": jobs, "options": {"small": True}})]) == 0
    lines = [json.loads(line.partition(" ")[2]) for line in capsys.readouterr().out.splitlines()]
    found = [line["row"] for line in lines if "row" in line]
    assert (
        found[0]["error"].startswith("KeyError")
        and found[1]["error"] == "ValueError: part 'nonsense': nobody does it"
    )
    assert found[2]["platform"] == "cpu" and sum("done" in line for line in lines) == 3


def test_a_child_ends_with_an_error_that_every_later_call_would_meet():
    def broken(job, options):
        raise jax.errors.JaxRuntimeError("INTERNAL: CUDA_ERROR_ILLEGAL_ADDRESS")

    with patch.object(kernels_child, "rows", broken), pytest.raises(jax.errors.JaxRuntimeError):
        kernels_child.main([json.dumps({"jobs": [["facts", "x"]], "options": {"small": True}})])


# --- time --------------------------------------------------------------------------------------------------------


class Ticks:
    """A clock that moves as a run says: 7 s to start, 2 s a call."""

    def __init__(self, start=7.0, call=2.0):
        self.now, self.start, self.call = 0.0, start, call

    def __call__(self):
        return self.now

    def run(self, count):
        self.now += self.start + self.call * count


def test_a_call_is_the_slope_between_few_and_many():
    ticks = Ticks()
    assert slope(ticks.run, (2, 10), ticks) == 2


def test_noise_is_named():
    ticks = Ticks(call=0)
    with pytest.raises(NoiseError, match="10 calls take no longer than 2"):
        slope(ticks.run, (2, 10), ticks)


def test_each_call_waits_for_the_one_before_and_has_a_base_of_its_own():
    calls = []

    def call(base, x_H):
        jax.debug.callback(lambda base: calls.append(int(base)), base)
        return x_H + base, x_H

    run = chains(call, (1, 5), 10, 3, (jnp.zeros(4),))
    run(5)
    jax.effects_barrier()
    assert calls == [0, 10, 20, 0, 10]
    text = chain(lambda base, x: (x * base, x), 3).lower(jnp.arange(3), jnp.ones(4)).as_text()
    assert text.count("optimization_barrier") == 3


# --- cases and goals ---------------------------------------------------------------------------------------------


def test_cases_have_names_of_their_own_and_every_goal_has_a_case():
    every = cases()
    names = [label(case) for case in every]
    assert len(set(names)) == len(names)
    steps = {(case.batch, context) for case in every if isinstance(case, Decode) for context in case.contexts}
    assert DECODE_GOALS.keys() <= steps
    assert PREFILL_GOALS.keys() <= {(case.tokens, case.prefix) for case in every if isinstance(case, Prefill)}
    assert steps >= {(batch, context * KIB) for batch in (1, 8, 64, 256) for context in (1, 8, 32)}


def test_ragged_lengths_sum_to_the_uniform_ones():
    ragged = Decode("x", LLAMA_8B, 64, (16 * KIB + 512,), ragged=True)
    lengths = ragged.lengths(16 * KIB + 512)
    assert sum(lengths) == 64 * (16 * KIB + 512) and min(lengths) >= 1024 and max(lengths) <= ragged.longest
    assert max(lengths) > 30 * KIB and len(set(lengths)) > 60


def test_goals_are_those_of_the_bytes_that_a_case_reads():
    case = Decode("x", LLAMA_8B, 64, (KIB, 32 * KIB))
    assert goal(case, KIB, 64 * KIB * 4096) == Goal(0.70, 0.82, 0.93)
    assert goal(case, 32 * KIB, 64 * 32 * KIB * 4096) == Goal(0.82, 0.90, 0.98)
    assert goal(case, 2 * KIB, 1) is None
    first = goal(Decode("x", LLAMA_8B, 1, (KIB,)), KIB, KIB * 4096)
    assert first.ship == pytest.approx(KIB * 4096 / 15e-6 / 4.3e12)
    assert [first.met(share) for share in (0, first.ship, first.best, 1)] == ["none", "ship", "best", "moonshot"]


def test_a_token_at_the_end_of_a_prefix_sees_all_of_it():
    whole, chunk = Prefill("x", LLAMA_8B, 4), Prefill("x", LLAMA_8B, 2, 2)
    assert whole.flops == 4 * 128 * 32 * (1 + 2 + 3 + 4) and chunk.flops == 4 * 128 * 32 * (3 + 4)


def test_a_pool_has_as_many_copies_as_calls_and_memory_allow():
    case = Decode("x", LLAMA_8B, 1, (KIB, 8 * KIB))
    small, large = plan(case, 1 << 27), plan(case, 1 << 40)
    assert small.copies == 3 and large.copies == large.counts[1] and large.columns == 128


def test_contexts_that_do_not_fit_are_named_and_the_others_go_on():
    case = Decode("x", LLAMA_8B, 1, (KIB, 32 * KIB))
    kept, large = fitting(case, 100 << 20)
    assert kept.contexts == (KIB,) and large == {32 * KIB: "0.1 GB of keys and values do not fit 0.1 GB of memory"}
    assert fitting(case, 1 << 40) == (case, {})
    with pytest.raises(MemoryError, match="do not fit"):
        fitting(case, 1 << 20)


def test_timed_rows_use_every_block_of_their_copy_once():
    case = small_cases()[1]
    laid = plan(case, 1 << 30)
    rows = rows_of(case, case.contexts[0], laid.columns)
    used = -(-(rows.start_B + 1) // case.block)
    blocks = np.concatenate([rows.table_BM[b, : used[b]] for b in range(case.batch)])
    assert sorted(blocks.tolist()) == list(range(laid.blocks))


@pytest.mark.parametrize("pool", ["bfloat16", "int8", "float8_e4m3fn"])
def test_timed_pools_hold_numbers_everywhere(pool):
    pools = timed_pools(5, 2, 16, 8, pool)
    leaves = [np.asarray(leaf, np.float32) for leaf in jax.tree.leaves(pools)]
    assert all(np.isfinite(leaf).all() and len(leaf) == 5 for leaf in leaves)
    assert leaves[0].std() > 0.5


def test_tables_are_wild_past_their_rows():
    table_BM = timed_table(np.random.default_rng(0), [33, 16], 16, 8)
    assert sorted([*table_BM[0, :3], table_BM[1, 0]]) == [0, 1, 2, 3]
    assert np.abs(table_BM[1, 1:].astype(np.int64)).min() > 1000


# --- checks ------------------------------------------------------------------------------------------------------

CHUNKS = "qwen2-0.5b mixed 512"
ORDERED = "llama-8b mixed 2048 invariant"


def with_kernel(part, attend):
    """`part` is served by a kernel of that call."""
    kernel = type("Kernel", (), {"Config": namedtuple("Config", "x"), "attend": staticmethod(attend)})
    return patch.dict(KERNELS, {part: (("mosaic", kernel),)})


def chunks_by(change):
    def attend(q_TNH, k, v, rows, *, target, **options):
        return change(*xla_chunks.attend(q_TNH, k, v, rows, platform="cpu", **options))

    return attend


def test_every_kind_of_served_row_has_its_edges():
    rng = np.random.default_rng(0)
    for row in served.SERVED:
        spans = mixed_spans(rng, row) if row.rows else decode_spans(rng, row)
        full = row.columns * row.block
        assert all(start >= 0 and start + count <= full for start, count in spans), row.name
        assert max(start + count for start, count in spans) == full, row.name
        if row.rows:
            counts = [count for _, count in spans]
            assert len(spans) <= row.rows and 0 in counts and 1 in counts and max(counts) > 1, row.name
            assert row.tokens - 7 <= sum(counts) + 7 and sum(counts) <= row.tokens, row.name
        elif row.tokens > 8:
            lengths = {start + count for start, count in spans if count}
            assert {1, row.block - 1, row.block, row.block + 1} <= lengths and (0, 0) in spans, row.name


def test_a_scene_holds_nan_wherever_nothing_was_written():
    row = shrunk(next(row for row in served.SERVED if row.name == CHUNKS))
    rng = np.random.default_rng(1)
    scene = judged_scene(rng, row, mixed_spans(rng, row), row.tokens)
    k_PKCH = np.asarray(scene.k.astype(jnp.float32))
    ends = scene.rows.start_B + scene.rows.count_B
    assert np.isfinite(k_PKCH).sum() == ends[scene.rows.count_B > 0].sum() * k_PKCH.shape[1] * k_PKCH.shape[3]
    assert scene.base > 0 and np.isnan(k_PKCH[: scene.base]).all()
    keys_SKH, _ = scene.seen(0)
    assert np.isfinite(keys_SKH[: ends[0]]).all() and np.isnan(keys_SKH[ends[0] :]).all()


def test_the_xla_path_is_found_right():
    row = check(CHUNKS, "chunks", "xla", True)
    assert row["failed"] == "" and row["error_max"] < 1e-5 and row["judged"] >= 5


def test_outputs_that_are_off_by_two_in_a_hundred_are_found():
    with with_kernel("chunks", chunks_by(lambda o, lse: (1.02 * o, lse))):
        row = check(CHUNKS, "chunks", "mosaic", True)
    assert row["failed"] == "error" and row["error_max"] == pytest.approx(0.02, rel=0.1)


def test_masses_that_are_off_and_what_is_not_finite_are_found():
    with with_kernel("chunks", chunks_by(lambda o, lse: (o, lse + 0.1))):
        assert check(CHUNKS, "chunks", "mosaic", True)["failed"] == "mass"
    with with_kernel("chunks", chunks_by(lambda o, lse: (o.at[:, 0, 0].set(jnp.nan), lse))):
        assert check(CHUNKS, "chunks", "mosaic", True)["failed"] == "error, not finite"


def test_bits_that_change_from_call_to_call_are_found():
    turns = iter(range(100))

    def flicker(o, lse):
        turn = jax.pure_callback(lambda: np.float32(next(turns)), jax.ShapeDtypeStruct((), np.float32))
        return o + 1e-6 * turn, lse

    with with_kernel("chunks", chunks_by(flicker)):
        assert check(CHUNKS, "chunks", "mosaic", True)["failed"] == "not repeatable"


def test_bits_that_depend_on_what_shares_the_step_are_found():
    def attend(q_TNH, k, v, rows, *, target, **options):
        o_TNH, lse_TN = xla_ordered.attend(q_TNH, k, v, rows, **options)
        return o_TNH + 1e-6 * rows.count_B.sum(), lse_TN

    assert check(ORDERED, "ordered", "xla", True)["failed"] == ""
    with with_kernel("ordered", attend):
        assert check(ORDERED, "ordered", "mosaic", True)["failed"] == "not invariant"


# --- parts -------------------------------------------------------------------------------------------------------


def around(tmp_path, target=H200, **others):
    return Around(tmp_path, False, "", sys.executable, lambda row: None, target, 100 << 30, **others)


def test_every_served_row_is_checked_once_by_each_kernel_that_serves_it(tmp_path):
    jobs = kernels_parts.check_jobs(around(tmp_path))
    assert len(set(jobs)) == len(jobs)
    assert {job.case for job in jobs} == {row.name for row in served.SERVED if row.target == "h200"}
    assert {job.piece for job in jobs if "invariant" in job.case} == {"ordered"}
    assert Job("check", "llama-8b decode 64 float32", "xla", "decode") in jobs


def test_the_kernels_that_the_dispatcher_takes_come_first(tmp_path):
    jobs = kernels_parts.check_jobs(around(tmp_path))
    rows = {row.name: row for row in served.SERVED}
    ranks = [names(job.piece, H200, shape_of(rows[job.case])).index(job.by) for job in jobs]
    assert ranks == sorted(ranks) and set(ranks) >= {0, 1}
    told = []
    with patch.object(kernels_parts, "run", lambda jobs, *rest, **others: told.extend(jobs) or []):
        kernels_parts.speed(around(tmp_path), 1)
    chosen = [job.piece for job in told]
    assert chosen.count(CHOSEN) == len(cases()) and "" not in chosen[: chosen.count(CHOSEN)]


def test_a_machine_without_a_gpu_takes_small_sizes(tmp_path):
    facts = {**CPU._asdict(), "memory_bytes": None, "jax": "1"}
    knowing = around(tmp_path).knowing(facts)
    assert knowing.small and knowing.memory_bytes > 1 << 20 and len(kernels_parts.check_jobs(knowing)) < 15
    assert not around(tmp_path).knowing({**H200._asdict(), "memory_bytes": 5, "jax": "1"}).small


def test_tools_that_are_not_there_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(kernels_parts.shutil, "which", lambda name: None)
    assert "not on PATH" in kernels_parts.sanitize(around(tmp_path), 1)[0]["skipped"]
    monkeypatch.setattr(kernels_parts.importlib.util, "find_spec", lambda name: None)
    assert "not installed" in kernels_parts.torch(around(tmp_path), 1)[0]["skipped"]
    unknown = H200._replace(kind="NVIDIA H900")
    assert "no description of NVIDIA H900" in kernels_parts.loads(around(tmp_path, unknown), 1)[0]["skipped"]


def test_the_sanitizers_summary_is_read(tmp_path):
    log = tmp_path / "memcheck.log"
    assert kernels_parts.summary(log) == {"error": "it wrote no summary"}
    log.write_text("========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n")
    assert kernels_parts.summary(log) == {"errors": 0, "failed": ""}
    log.write_text("========= Invalid read\n========= RACECHECK SUMMARY: 3 hazards displayed (3 errors)\n")
    assert kernels_parts.summary(log) == {"errors": 3, "failed": "========= Invalid read"}


def test_an_executable_that_was_written_is_run_and_compared():
    arguments, own = (jnp.arange(4.0), jnp.float32(2)), secrets.randbits(16)  # what a cache held cannot be written
    data = jax.jit(lambda x_H, y: x_H * y + own).lower(*arguments).compile().runtime_executable().serialize()
    row = kernels_loads.compare(data, jnp.arange(4.0) * 2 + own, arguments)
    assert row == {"loads": "yes", "bytes": len(data), "reason": "equal bits"}
    assert "off by 6" in kernels_loads.compare(data, jnp.zeros(4) + own, arguments)["reason"]
    row = kernels_loads.compare(b"nonsense", jnp.zeros(4), arguments)
    assert row["loads"] == "no" and row["reason"]
    assert kernels_loads.target_name("NVIDIA H200") == "h200" and kernels_loads.target_name("NVIDIA H900") is None


def test_launches_are_those_of_the_largest_program(tmp_path):
    (tmp_path / "module_1.load.thunk_sequence.txt").write_text("000: kKernel fusion\n")
    (tmp_path / "module_2.step.thunk_sequence.txt").write_text("000: kKernel a\n001: kGemm b\n002: kCustomCall c\n")
    passed = "000: kCommandBuffer x\n    000: kKernel a\n    001: kGemm b\n001: kCustomCall c\n"
    (tmp_path / "module_2.step.thunk_sequence_after_thunk_passes.txt").write_text(passed)
    assert launches(tmp_path) == {"launches": 3, "command buffers": 1, "launches in them": 2}


# --- what is said ------------------------------------------------------------------------------------------------


def timed(case, context, us, by="mosaic", part="speed", piece=CHOSEN):
    known = {label(case): case for case in cases()}[case]
    moved = known.position_bytes * (known.longest if isinstance(known, Prefill) else known.batch * context)
    row = {"part": part, "case": case, "by": by, "piece": piece, "context": context, "us": us, "bytes": moved}
    row["GB/s"] = moved / us / 1e3
    return row | ({"flops": known.flops, "TFLOP/s": known.flops / us / 1e6} if isinstance(known, Prefill) else {})


CEILINGS = [
    {"part": "ceilings", "case": "copy", "us": 1.0, "GB/s": 4000.0},
    {"part": "ceilings", "case": "read", "us": 1.0, "GB/s": 4400.0},
    {"part": "ceilings", "case": "matmul", "us": 1.0, "TFLOP/s": 800.0},
]


def test_a_row_stands_beside_the_ceiling_its_goals_and_the_best_library():
    bytes_us = 64 * 8 * KIB * 4096 / 4e12 * 1e6  # what a copy would take
    rows = [
        *CEILINGS,
        timed("decode llama-8b 64", 8 * KIB, bytes_us / 0.91),
        timed("decode llama-8b 64", 8 * KIB, 5 * bytes_us, "cudnn", "library", ""),
        timed("decode llama-8b 64", 8 * KIB, 2 * bytes_us, "sdpa", "torch", "4"),
        timed("prefill llama-8b 8192", 8 * KIB, 1e6 * cases()[7].flops / 400e12),
    ]
    found = judged(rows)[3:]
    assert label(cases()[7]) == "prefill llama-8b 8192"
    assert found[0]["share"] == pytest.approx(0.91) and found[0]["of reading"] == pytest.approx(0.91 / 1.1)
    assert found[0]["reaches"] == "best" and found[0]["gap"] == pytest.approx(0.91 / 0.82 - 1)
    assert (found[0]["library"], found[0]["x library"]) == ("sdpa", pytest.approx(2 * 0.91))
    assert "library" not in found[1] and found[3]["share"] == pytest.approx(0.5) and found[3]["reaches"] == "none"
    assert missed(judged(rows), small=False) == [
        "speed prefill llama-8b 8192 8192 mosaic chosen: 0.500, has to ship 0.571"
    ]
    assert missed(judged(rows), small=True) == []


def test_without_ceilings_there_are_no_shares():
    assert "share" not in judged([timed("decode llama-8b 64", KIB, 10.0)])[0]


def test_speeds_are_compared_within_a_run():
    rows = [
        timed("decode llama-8b 64", 8 * KIB, 100.0),
        timed("decode llama-8b int8 64", 8 * KIB, 80.0),
        timed("decode llama-8b fp8 64", 8 * KIB, 55.0),
        timed("decode llama-8b C16 64", 8 * KIB, 105.0),
        timed("decode llama-8b C64 64", 8 * KIB, 100.0),
        timed("decode group 16 64", 8 * KIB, 120.0),
        timed("decode group 4 64", 8 * KIB, 100.0),
        timed("decode llama-8b 64 ragged", 16896, 100.0),
        timed("decode llama-8b 64 uniform", 16896, 95.0),
    ]
    found = {(row["what"], row["case"]): row for row in ratios(rows)}
    assert len(found) == 5
    assert found["8-bit keys", "decode llama-8b int8 64"]["reaches"] == "none"
    assert found["8-bit keys", "decode llama-8b fp8 64"]["ratio"] == pytest.approx(100 / 55)
    assert found["blocks of 16", "decode llama-8b C16 64"]["reaches"] == "ship"
    assert found["heads of a group", "decode group 16 64"]["reaches"] == "none"
    assert found["ragged lengths", "decode llama-8b 64 ragged"]["ratio"] == pytest.approx(0.95)
    assert len(missed(ratios(rows), small=False)) == 2
    assert {ratio.words for ratio in RATIOS} == {what for what, _ in found} | {"blocks of 128"}


def test_what_is_wrong_is_named_and_a_librarys_troubles_are_not_ours():
    rows = [
        {"part": "check", "case": "a", "by": "mosaic", "piece": "decode", "failed": "error, mass"},
        {"part": "speed", "case": "b", "by": "mosaic", "error": "LLVM ERROR"},
        {"part": "library", "case": "c", "by": "cudnn", "error": "no cudnn"},
        {"part": "loads", "case": "d", "loads": "no", "reason": "INTERNAL"},
        {"part": "speed", "case": "e", "by": "mosaic", "skipped": "does not fit"},
    ]
    wrong = ["check a mosaic decode: error, mass", "speed b mosaic: LLVM ERROR", "loads d: INTERNAL"]
    assert missed(rows, small=True) == wrong
    titles = dict(tables(rows))
    assert [row["case"] for row in titles["\nwhat was not measured, and why"]] == ["b", "c", "e"]


def test_an_unknown_part_is_answered_with_the_known_ones(capsys):
    with pytest.raises(SystemExit):
        kernels.main(["--only", "speeed"])
    assert "got speeed; expected some of ceilings" in capsys.readouterr().err


def test_parts_stand_in_their_order_whatever_the_order_of_asking():
    asked = kernels.options(["--only", "speed,ceilings", "--sanitize"])
    assert kernels.parts(asked) == ["ceilings", "speed", "sanitize"]
    assert kernels.parts(kernels.options([])) == list(kernels.USUAL)


def test_the_whole_runs_small_on_a_cpu(tmp_path, capsys):
    """Costs three starts of a process and a few small compilations."""
    out = tmp_path / "out.jsonl"
    assert kernels.main(["--only", "speed,check", "--case", "small 8 after", "--out", str(out)]) == 0
    said = capsys.readouterr()
    assert "prefill: shares of a large product's" in said.out
    assert said.out.splitlines()[-1].startswith("0 things are wrong, ")
    assert "speed prefill small 8 after 24 xla: context 32" in said.err
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert all(line["figures"]["device"] == "cpu" and line["figures"]["jax"] for line in lines)
    assert any(line["figures"].get("us", 0) > 0 for line in lines)


@pytest.mark.slow
def test_every_part_runs_small_on_a_cpu(tmp_path):
    """Costs two minutes: every part, in processes of its own."""
    out = tmp_path / "out.jsonl"
    assert kernels.main(["--loads", "--sanitize", "--out", str(out)]) == 0
    found = [json.loads(line)["figures"] for line in out.read_text().splitlines()]
    assert {row["part"] for row in found} >= {"ceilings", "check", "speed", "library", "torch", "step", "loads"}
    assert not any("error" in row for row in found)


def test_what_was_measured_before_an_interrupt_is_kept(tmp_path, monkeypatch):
    second = {"part": "speed", "case": "x", "skipped": "noise"}

    def interrupted(around, limit_s):
        around.told(second)
        raise KeyboardInterrupt

    kept = []
    first = {"part": "ceilings", "case": "copy", "us": 1.0, "GB/s": 2.0}
    shares = []
    parts = {
        "one": kernels_parts.Described(lambda around, limit_s: shares.append(limit_s) or [first], 1),
        "two": kernels_parts.Described(interrupted, 3),
    }
    monkeypatch.setattr(kernels, "PARTS", parts)
    rows = kernels.run_parts(["one", "two"], around(tmp_path), 100, kept.extend)
    assert kept == [first, second] and rows[:2] == [first, second]
    assert rows[2]["error"] == "interrupted" and missed(rows, small=True)
    assert shares == [pytest.approx(25, abs=1)]
    assert kernels.tables(rows)[-1][1][1]["error"] == "interrupted"
