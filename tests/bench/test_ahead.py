import json
import sys

import pytest

from bench import ahead, ahead_step
from bench.ahead import compile_all, differences, line, pinned, record
from bench.ahead_compile import fresh, in_buffers, is_launch, mosaic_shared
from bench.ahead_step import moved

FAKE = f"""#!{sys.executable}
import json, os, sys, time
for name in sys.argv[5:]:
    print("words of a compiler")
    print("AHEAD", json.dumps({{"name": name, "began": True}}), flush=True)
    if name == "bad":
        print("LLVM ERROR: Cannot select: intrinsic", "and more", sep=chr(10), file=sys.stderr, flush=True)
        os.abort()
    if name == "slow":
        time.sleep(60)
    print("AHEAD", json.dumps({{"name": name, "kernels": {{}}}}), flush=True)
"""
KERNEL = {"registers": 56, "spill_bytes": 0, "shared_bytes": 1024, "wgmma": 8, "mma": 0, "tma": 2, "warnings": []}


@pytest.fixture
def fake(tmp_path):
    """A Python that compiles nothing and tells as bench.ahead_compile does."""
    path = tmp_path / "python"
    path.write_text(FAKE)
    path.chmod(0o755)
    return str(path)


def test_a_row_that_ends_its_process_is_named_and_the_others_go_on(fake):
    found = compile_all(fake, ["a", "bad", "b", "c", "d", "e"])
    assert list(found) == ["a", "bad", "b", "c", "d", "e"]
    assert found["bad"] == {"error": "LLVM ERROR: Cannot select: intrinsic"}
    assert all(row == {"kernels": {}} for name, row in found.items() if name != "bad")


def test_a_row_that_does_not_end_is_named_too(fake):
    found = compile_all(fake, ["a", "slow", "b", "c"], timeout_s=2)
    assert found["slow"] == {"error": "not done after 2 s"} and found["c"] == {"kernels": {}}


def test_a_python_that_says_nothing_fails_every_row(tmp_path):
    path = tmp_path / "python"
    path.write_text("#!/bin/sh\nexit 3\n")
    path.chmod(0o755)
    assert [row["error"] for row in compile_all(str(path), ["a", "b", "c"]).values()] == ["it said nothing"] * 3


def test_rows_are_told_as_they_come(fake):
    told = []
    compile_all(fake, ["a", "b", "bad"], told=lambda row: told.append(row["name"]))
    assert sorted(told) == ["a", "b", "bad"]


@pytest.mark.parametrize(
    "change, words",
    [
        ({"registers": 57}, "decode: registers 57, recorded 56"),
        ({"spill_bytes": 4}, "decode: spill_bytes 4, recorded 0"),
        ({"shared_bytes": None}, "decode: shared_bytes None, recorded 1024"),
        ({"wgmma": 7}, "decode: wgmma 7, recorded 8"),
        ({"tma": 0}, "decode: tma 0, recorded 2"),
    ],
)
def test_a_kernel_that_changed_is_named(change, words):
    then = {"row": {"kernels": {"decode": KERNEL}, "temp_bytes": 0}}
    now = {"row": {"kernels": {"decode": KERNEL | change}, "temp_bytes": 0}}
    assert differences(then, then) == []
    assert differences(now, then) == [f"row: {words}"]


def test_more_tensor_cores_are_no_fault():
    then, now = ({"row": {"kernels": {"decode": KERNEL | {"wgmma": count}}, "temp_bytes": 0}} for count in (8, 9))
    assert differences(now, then) == []


def test_temporaries_may_grow_by_a_tenth():
    then, same, more = ({"row": {"kernels": {}, "temp_bytes": size}} for size in (1000, 1100, 1101))
    assert differences(same, then) == []
    assert differences(more, then) == ["row: 1101 bytes of temporaries, recorded 1000"]


def test_rows_that_failed_came_or_went_are_named():
    kernel, none = {"kernels": {"decode": KERNEL}}, {"kernels": {}}
    assert differences({"a": {"error": "no"}}, {"a": kernel}) == ["a: no"]
    assert differences({"a": kernel}, {}) == ["a: not recorded"]
    assert differences({}, {"a": kernel}) == ["a: recorded, but no row is called so"]
    assert differences({"a": none}, {"a": kernel}) == ["a: kernels [], recorded ['decode']"]


def test_a_record_keeps_what_other_versions_and_rows_hold(tmp_path, monkeypatch):
    file = tmp_path / "compiled.json"
    names = list(ahead.STEPS)[:2]
    rows = {names[0]: {"launches": 1}, "gone": {"launches": 1}}
    file.write_text(json.dumps({"0.0.1": {}, ahead.importlib.metadata.version("jax"): {"rows": rows}}))
    monkeypatch.setattr(ahead, "RECORDED", file)
    record({names[1]: {"launches": 2, "compile_s": 3.0}, names[0]: {"error": "no"}})
    (version, mine) = json.loads(file.read_text()).popitem()
    assert json.loads(file.read_text()).keys() == {"0.0.1", version}
    assert mine["rows"] == {names[0]: {"launches": 1}, names[1]: {"launches": 2}}
    assert mine["packages"].keys() == ahead.PACKAGES.keys()


def test_the_compilers_are_pinned_to_the_version_of_jax():
    assert pinned("1.2.3")[0] == "jax-cuda13-plugin==1.2.3"
    assert all("==" in requirement for requirement in pinned("1.2.3"))


def test_a_line_names_every_kernel():
    row = {"name": "row", "kernels": {"decode": KERNEL}, "launches": 4, "host_calls": 2, "temp_bytes": 1 << 20}
    words = line(row | {"lower_s": 0.5, "compile_s": 1.0})
    assert "row" in words and "1.0 MiB" in words
    assert "decode: 56 registers, 0 spilled, 1024 shared, 8 wgmma, 2 tma" in words
    assert "FAILED because" in line({"name": "row", "error": "because"})


def test_large_arrays_that_a_program_moves_are_found_inside_fusions_too():
    text = """
    %fused (p: bf16[64,8]) -> bf16[8,64] {
      ROOT %transpose.1 = bf16[8,64]{1,0} transpose(%p), dimensions={1,0}
    }
      %copy.2 = bf16[8,64]{0,1} copy(%x)
      %copy.3 = s32[4]{0} copy(%y)
      %start = (bf16[8,64]{1,0}, bf16[8,64]{0,1}, u32[]) copy-start(%z)
      %fusion.4 = bf16[8,64]{1,0} fusion(%copy.2), kind=kLoop
    """
    assert [words.split()[0] for words in moved(text, 1024)] == ["transpose", "copy", "copy-start"]
    assert moved(text, 1025) == []


def test_what_stands_in_a_command_buffer_is_told_from_what_does_not():
    lines = [
        "000: kCommandBuffer [source | next=003 (1)]",
        "    001: kCustomKernel [source | sink] fusion grid: [1, 1, 1]",
        "    002: kCustomCall [source | sink] kCustomCall",
        "003: kAllReduce [prev=000 (1)]",
        "004: kConditional [prev=003 (1)]",
        "  false_branch:",
        "    000: kCommandBuffer [source | sink]",
        "        005: kCopy [source | sink] kCopy",
    ]
    assert [line.split(":")[0].strip() for line in in_buffers(lines)] == ["001", "002", "005"]
    assert [is_launch(line) for line in lines] == [False, True, True, True, False, False, False, True]


def test_the_shared_memory_of_a_mosaic_kernel_counts_its_barriers():
    words = (
        "Resources(smem_scratch_bytes=146432, tmem_scratch_cols=0, barrier_counts=Counter({"
        "Barrier(arrival_count=128, num_barriers=4, orders_tensor_core=False): 4, "
        "Barrier(arrival_count=128, num_barriers=1, orders_tensor_core=False): 1}), scoped_gmem_semaphores={})"
    )
    assert mosaic_shared(words) == 146432 + 8 * 5


def test_kernels_of_one_name_are_numbered():
    found = {}
    for _ in range(3):
        found[fresh("decode", found)] = 1
    assert list(found) == ["decode", "decode.1", "decode.2"]


def test_a_step_is_found_by_its_name():
    assert [ahead_step.named(name).name for name in ahead.STEPS] == list(ahead.STEPS)
