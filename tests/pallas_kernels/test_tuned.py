import json

import pytest

from pallas_kernels import tuned
from pallas_kernels.shape import Shape
from pallas_kernels.target import CPU, H200

SHAPE = Shape(4, 128, 64, "bfloat16", "bfloat16")
ENTRY = {
    "part": "decode",
    "dtype": "bfloat16",
    "pool": "bfloat16",
    "head_width": 128,
    "group": 4,
    "block": 64,
    "tokens": 64,
    "kernel": "mosaic",
    "config": {"stages": 4, "tile": 64},
}


def write(folder, *entries, **others):
    file = folder / "nvidia-h200.json"
    file.write_text(json.dumps({"schema": 1, "device": "NVIDIA H200", "entries": entries} | others))
    tuned.entries.cache_clear()
    return folder


def find(folder, tokens=64, *, part="decode", shape=SHAPE, target=H200, kernel="mosaic", fields=("tile", "stages")):
    return tuned.find(target, part, shape, tokens, kernel=kernel, fields=fields, folder=folder)


def test_an_entry_is_found_by_what_it_was_tuned_for(tmp_path):
    write(tmp_path, ENTRY)
    assert find(tmp_path) == {"stages": 4, "tile": 64}
    assert find(tmp_path, part="chunks") is None
    for field in ("group", "head_width", "block"):
        assert find(tmp_path, shape=SHAPE._replace(**{field: 16})) is None
    assert find(tmp_path, shape=SHAPE._replace(pool_dtype="int8")) is None
    assert find(tmp_path, shape=SHAPE._replace(dtype="float16")) is None


def test_tokens_count_up_to_the_next_power_of_two(tmp_path):
    write(tmp_path, ENTRY)
    assert [find(tmp_path, tokens) is not None for tokens in (32, 33, 63, 64, 65)] == [
        False,
        True,
        True,
        True,
        False,
    ]
    assert [tuned.key("decode", SHAPE, tokens).tokens for tokens in (0, 1, 2, 3)] == [1, 1, 2, 4]


def test_another_kernel_and_another_device_ask_their_rule(tmp_path):
    write(tmp_path, ENTRY)
    assert find(tmp_path, kernel="triton") is None
    assert find(tmp_path, target=H200._replace(kind="NVIDIA H100 80GB HBM3")) is None
    assert find(tmp_path, target=CPU) is None


def test_invariant_numerics_never_look_at_a_file(tmp_path):
    write(tmp_path).joinpath("nvidia-h200.json").write_text("broken")
    assert find(tmp_path, part="ordered") is None
    with pytest.raises(ValueError, match="nvidia-h200"):
        find(tmp_path, part="decode")


def test_a_field_that_the_kernel_does_not_have_is_named_with_its_file(tmp_path):
    write(tmp_path, ENTRY)
    with pytest.raises(
        ValueError, match=r"nvidia-h200\.json: decode of mosaic has no stages, only tile; .*bench tune"
    ):
        find(tmp_path, fields=("tile",))


@pytest.mark.parametrize(
    ("entries", "others", "words"),
    [
        ([ENTRY], {"schema": 2}, "schema 2; expected 1"),
        ([ENTRY, ENTRY], {}, "two entries"),
        ([ENTRY | {"part": "ordered"}], {}, "part 'ordered'"),
        ([ENTRY | {"config": {"tile": 0}}], {}, "tile=0"),
        ([ENTRY | {"config": {"tile": True}}], {}, "tile=True"),
        ([ENTRY | {"config": [64]}], {}, "expected a name and an object"),
        ([{name: value for name, value in ENTRY.items() if name != "group"}], {}, "no 'group'"),
        ([7], {}, "not subscriptable"),
    ],
)
def test_a_broken_file_is_an_error_that_names_it_and_says_what_to_do(tmp_path, entries, others, words):
    write(tmp_path, *entries, **others)
    with pytest.raises(ValueError, match=r"nvidia-h200\.json: .*bench tune`, or delete it") as error:
        find(tmp_path)
    assert words in str(error.value)


def test_what_is_shipped_can_be_read():
    for file in tuned.FOLDER.glob("*.json"):
        assert tuned.entries(file), file.name
    assert tuned.file_of(H200).name == "nvidia-h200.json" and tuned.FOLDER.is_dir()
