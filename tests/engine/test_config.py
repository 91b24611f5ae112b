"""Settings: their spellings, their precedence, their domains, and what is said of a mistake."""

import math
from dataclasses import fields
from pathlib import Path

import pytest

from engine.config import BYTES, ROWS, TIME, Settings, read_file, settle
from engine.errors import ConfigError

DEFAULTS = Settings()


def write(folder: Path, content: str | bytes) -> Path:
    path = folder / "serac.toml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_a_flag_beats_the_environment_which_beats_the_file_which_beats_the_default(tmp_path):
    file = write(tmp_path, "port = 1\nhost = '::1'\nblock_size = 32\nprefix_cache = false\n")
    environment = {"SERAC_PORT": "2", "SERAC_HOST": "localhost"}
    settings = settle({"port": "3"}, environment, file)
    assert (settings.port, settings.host, settings.block_size) == (3, "localhost", 32)
    assert settings.prefix_cache is False and settings.admin_port == DEFAULTS.admin_port
    assert settle({}, {}) == DEFAULTS


def test_every_setting_can_be_given_in_all_three_spellings(tmp_path):
    samples = {"model": "m", "mesh": "tp=2", "dtype": "float32", "device": "cpu", "numerics": "invariant"}
    samples |= {"prefix_cache": "false", "log_level": "warning", "kv_dtype": "int8", "worker_api": "vllm"}
    samples |= {"kv_mover": "nixl"}
    for name, row in ROWS.items():
        text = samples.get(name) or next(t for t in ("16", "true", "some/path") if _reads(row, t))
        by_flag = getattr(settle({name: text}, {}), name)
        assert by_flag != row.default, name
        assert getattr(settle({}, {row.variable: text}), name) == by_flag
        literal = text if text in ("16", "true", "false") else f"'{text}'"
        assert getattr(settle({}, {}, write(tmp_path, f"{name} = {literal}\n")), name) == by_flag


def _reads(row, text: str) -> bool:
    try:
        row.kind.read(text)
    except ValueError:
        return False
    return True


def test_every_setting_has_help_and_a_default_inside_its_domain():
    assert list(ROWS) == [each.name for each in fields(Settings)]
    for row in ROWS.values():
        assert row.help and row.kind.expected
        if row.default is not None:
            shown = str(row.default).lower() if isinstance(row.default, bool) else str(row.default)
            assert row.kind.read(shown) == row.default, row.name


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("block_size", "0", "--block-size: got '0'; expected one of 16, 32, 64, 128"),
        ("block_size", "17", "--block-size"),
        ("block_size", "1048576", "--block-size"),
        ("port", "70000", "--port: got '70000'; expected a port 1..65535"),
        ("port", "-1", "--port"),
        ("port", "tcp://10.0.0.1:50051", "--port"),
        ("drain", "-5", "--drain: got '-5'; expected a duration >= 0 such as 30, 1.5s, 500ms, 5m or 1h"),
        ("drain", "nan", "--drain"),
        ("drain", "inf", "--drain"),
        ("drain", "5 minutes", "--drain"),
        ("kv_memory", "0", "--kv-memory: got '0'; expected a size > 0 such as 1073741824, 16GB or 512MiB"),
        ("kv_memory", "-1GB", "--kv-memory"),
        ("kv_memory", "16 gigs", "--kv-memory"),
        ("kv_memory", "1e9", "--kv-memory"),
        ("max_num_seqs", "0", "--max-num-seqs: got '0'; expected an integer in 1.."),
        ("max_num_seqs", "5.5", "--max-num-seqs"),
        ("max_num_seqs", "9" * 30, "--max-num-seqs"),
        ("max_num_seqs", "٣", "--max-num-seqs"),
        ("numerics", "exact", "--numerics: got 'exact'; expected one of fast, invariant"),
        ("prefix_cache", "yes", "--prefix-cache: got 'yes'; expected true or false"),
        ("model", "", "--model"),
        ("host", "a\nb", "--host"),
    ],
)
def test_what_is_outside_a_domain_is_refused_with_the_accepted_forms(name, text, words):
    with pytest.raises(ConfigError) as caught:
        settle({name: text}, {})
    assert words in str(caught.value) and caught.value.exit_code == 2 and caught.value.field == name
    with pytest.raises(ConfigError, match=f"^{ROWS[name].variable}: got"):
        settle({}, {ROWS[name].variable: text})


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1073741824", 2**30),
        ("16GB", 16 * 10**9),
        ("512MiB", 2**29),
        ("1.5 GiB", 3 * 2**29),
        ("7B", 7),
        ("2KB", 2000),
    ],
)
def test_sizes_are_bytes_with_decimal_and_binary_units(text, size):
    assert BYTES.read(text) == size


@pytest.mark.parametrize(
    ("text", "seconds"), [("30", 30), ("1.5s", 1.5), ("500ms", 0.5), ("5m", 300), ("1h", 3600), ("0", 0)]
)
def test_durations_are_seconds_with_units(text, seconds):
    assert math.isclose(TIME.read(text), seconds)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("mesh = 'tp=4'\ntensor_paralel = 2\n", "2:1: tensor_paralel: unknown key"),
        ("blok_size = 16\n", "1:1: blok_size: unknown key; did you mean block_size?"),
        ("port = 1\n\n  port = 2\n", "3:"),
        ("port = \n", "1:8: "),
        ("port = 1\nhost = 'x", "2:"),
        ("", "1:1: got an empty file"),
        ("# nothing but words\n", "1:1: got an empty file"),
        (b"port = 1\nhost = '\xff'\n", "2:9: got bytes that are not UTF-8"),
        ("port = 70000\n", "1:1: port: got '70000'; expected a port"),
        ("port = [1]\n", "1:1: port: got a list; expected a port"),
        ("[serve]\nport = 1\n", "1:2: serve: unknown key"),
        ("prefix_cache = 'maybe'\n", "1:1: prefix_cache: got 'maybe'"),
    ],
)
def test_a_mistake_in_a_file_is_told_with_its_place(tmp_path, content, words):
    path = write(tmp_path, content)
    with pytest.raises(ConfigError) as caught:
        read_file(path)
    assert str(caught.value).startswith(f"{path}:{words}"), caught.value
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match="--config: got .*none.toml.*No such file"):
        settle({}, {}, tmp_path / "none.toml")


def test_a_variable_that_is_nearly_ours_is_a_slip_and_one_that_is_not_is_somebody_elses():
    with pytest.raises(ConfigError, match="SERAC_BLOCKSIZE: unknown variable; did you mean SERAC_BLOCK_SIZE?"):
        settle({}, {"SERAC_BLOCKSIZE": "16"})
    assert settle({}, {"SERAC_SERVICE_ADDRESS": "10.0.0.1", "SERAC": "1", "PATH": "/bin"}) == DEFAULTS
