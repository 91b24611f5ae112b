"""The settings of a server as rows of data: name, kind, default, help. A setting has one name in three spellings:

    --block-size 32   over   SERAC_BLOCK_SIZE=32   over   block_size = 32 in --config FILE.toml   over   the default

Whatever is unknown, given twice or outside its domain is a ConfigError that names it as it was spelled.
Sizes are bytes: 1073741824, 16GB (10^9), 512MiB (2^20). Durations are seconds: 30, 1.5s, 500ms, 5m, 1h.
"""

import difflib
import math
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import NamedTuple

from engine.errors import ConfigError, wrong

PREFIX = "SERAC_"
SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]i?B|B)?", re.ASCII)
UNITS = {"B": 1} | {f"{letter}B": 10 ** (3 * k + 3) for k, letter in enumerate("KMGT")}
UNITS |= {f"{letter}iB": 2 ** (10 * k + 10) for k, letter in enumerate("KMGT")}
DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h)?", re.ASCII)
SECONDS = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
BLOCK_SIZES = (16, 32, 64, 128)
TOML_PLACE = re.compile(r"^(.*) \(at (?:line (\d+), column (\d+)|end of document)\)$", re.DOTALL)
Value = str | int | float | bool | Path | None


class Kind(NamedTuple):
    """What a setting may hold. `read` takes the text, and raises ValueError for what is not `expected`."""

    read: Callable[[str], Value]
    expected: str
    metavar: str

    def given(self, spelled: str, text: str | None) -> Value:
        """`text` read, None of None. Raises ConfigError under the name as it was spelled."""
        try:
            return None if text is None else self.read(text)
        except ValueError:
            field = spelled.rpartition(" ")[2].removeprefix("--").replace("-", "_").lower().removeprefix("serac_")
            raise ConfigError(wrong(spelled, text, self.expected), field=field) from None


def whole(least: int, most: int, expected: str = "") -> Kind:
    """An integer in a range."""

    def read(text: str) -> int:
        if not re.fullmatch(r"-?\d{1,18}", text, re.ASCII) or not least <= int(text) <= most:
            raise ValueError(text)
        return int(text)

    return Kind(read, expected or f"an integer in {least}..{most}", "N")


def one_of(*choices: str) -> Kind:
    """One of some words."""

    def read(text: str) -> str:
        if text not in choices:
            raise ValueError(text)
        return text

    return Kind(read, "one of " + ", ".join(choices), "|".join(choices))


def _size(text: str) -> int:
    match = SIZE.fullmatch(text)
    if match is None or float(match[1]) == 0:
        raise ValueError(text)
    return math.floor(float(match[1]) * UNITS[match[2] or "B"])


def _duration(text: str) -> float:
    match = DURATION.fullmatch(text)
    if match is None:
        raise ValueError(text)
    return float(match[1]) * SECONDS[match[2] or "s"]


def _block_size(text: str) -> int:
    if text not in map(str, BLOCK_SIZES):
        raise ValueError(text)
    return int(text)


def _switch(text: str) -> bool:
    if text not in ("true", "false", "1", "0"):
        raise ValueError(text)
    return text in ("true", "1")


def _words(text: str) -> str:
    if not text.strip() or not text.isprintable():
        raise ValueError(text)
    return text


TEXT = Kind(_words, "printable text", "TEXT")
PATH = Kind(lambda text: Path(_words(text)), "a path", "PATH")
COUNT = whole(1, 2**31 - 1)
BYTES = Kind(_size, "a size > 0 such as 1073741824, 16GB or 512MiB", "SIZE")
TIME = Kind(_duration, "a duration >= 0 such as 30, 1.5s, 500ms, 5m or 1h", "TIME")
PORT = whole(0, 65535, "a port 1..65535, or 0 for any free one")
BLOCK = Kind(_block_size, "one of 16, 32, 64, 128 positions", "N")
SWITCH = Kind(_switch, "true or false", "true|false")


def row(default: Value, kind: Kind, words: str) -> Value:
    """A setting: its default, what it may hold, what it is for."""
    return field(default=default, metadata={"kind": kind, "help": words})


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything `serac serve` can be told. None leaves the choice to the server, which says what it chose."""

    model: str = row("embedded", TEXT, "a model folder, ORG/NAME in the local Hugging Face cache, or embedded")
    mesh: str = row("auto", TEXT, "devices: tp=4, dp=2,tp=4, a count, or auto")
    lanes: str | None = row(
        None, TEXT, "lanes by role instead of --mesh: 'prefill:tp=2, decode:tp=4'; roles prefill, decode, both"
    )
    workers: bool = row(False, SWITCH, "each lane in a process of its own, which may be lost without the others")
    device: str = row("auto", one_of("auto", "cpu", "gpu"), "what to run on; auto takes the GPUs that are there")
    dtype: str = row(
        "auto", one_of("auto", "float32", "bfloat16", "float16"), "of weights and KV; auto suits the device"
    )
    kv_dtype: str = row(
        "auto", one_of("auto", "int8", "fp8"), "of KV blocks: 8 bits halve them, with a scale a token and head"
    )
    max_model_len: int | None = row(None, COUNT, "longest sequence, prompt and output; at most the model's context")
    kv_mover: str = row(
        "auto",
        one_of("auto", "sockets", "nixl"),
        "of KV between processes; auto: memory within a host, sockets between hosts",
    )
    kv_memory: int | None = row(None, BYTES, "bytes of each device for KV blocks")
    block_size: int | None = row(None, BLOCK, "positions in a KV block")
    max_num_seqs: int | None = row(
        None, COUNT, "most sequences that step together; default: 8 on CPU, 256 on a GPU"
    )
    max_num_batched_tokens: int | None = row(
        None, COUNT, "most tokens in a step; default: 128 on CPU, 2048 on a GPU"
    )
    served_model_name: str | None = row(None, TEXT, "the name clients use; default: that of the model")
    numerics: str = row(
        "fast", one_of("fast", "invariant"), "invariant: the same bits in any batch and on any mesh"
    )
    prefix_cache: bool = row(True, SWITCH, "share the blocks of equal prompt beginnings")
    allow_non_finite: bool = row(False, SWITCH, "load weights that hold NaN or infinity")
    download: bool = row(False, SWITCH, "fetch ORG/NAME from the Hugging Face hub when it is not in the cache")
    compile_cache: Path | None = row(
        None, PATH, "folder of compiled programs, mode 0700; default: in the user's cache"
    )
    plan_log: Path | None = row(
        None, PATH, "folder, mode 0700, of logs for serac replay; they hold all prompts as token ids; default: none"
    )
    plan_log_size: int = row(2**30, BYTES, "most bytes of the plan log of a lane; it stops there")
    host: str = row("127.0.0.1", TEXT, "address of the gRPC listener")
    port: int = row(50051, PORT, "its port")
    admin_host: str = row("127.0.0.1", TEXT, "address of the admin listener")
    admin_port: int = row(50052, PORT, "its port")
    metrics_port: int | None = row(None, PORT, "Prometheus metrics over HTTP on the admin host; default: none")
    tls_cert: Path | None = row(None, PATH, "PEM certificate chain of both listeners")
    tls_key: Path | None = row(None, PATH, "its private key")
    tls_client_ca: Path | None = row(
        None, PATH, "PEM certificates; clients of the public listener must show one that these signed"
    )
    worker_api: str = row(
        "none", one_of("none", "vllm"), "vllm: speak vllm.grpc.engine.VllmEngine beside serac.v1, for gateways"
    )
    token_file: Path | None = row(None, PATH, "bearer tokens, one a line; clients must send one of them")
    insecure_allow_remote: bool = row(False, SWITCH, "listen beyond this machine without TLS or a token")
    max_message_size: int = row(4 * 2**20, BYTES, "largest message accepted")
    max_calls: int = row(4096, COUNT, "most calls open at once")
    max_wait: float = row(30.0, TIME, "a request that would wait longer for its first token is refused")
    stall: float = row(30.0, TIME, "a client that reads nothing for so long loses its stream")
    log_dir: Path | None = row(
        None, PATH, "folder, mode 0700, of a log for each process of a lane, with --workers; default: none"
    )
    log_level: str = row("info", one_of("info", "warning", "error"), "what is logged: info has a line a request")
    drain: float = row(30.0, TIME, "how long open requests may go on after SIGTERM")


class Row(NamedTuple):
    """A setting in its spellings."""

    name: str
    kind: Kind
    default: Value
    help: str

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        return PREFIX + self.name.upper()


ROWS = {each.name: Row(each.name, default=each.default, **each.metadata) for each in fields(Settings)}


def suggestion(word: str, known: Iterable[str]) -> str:
    """`; did you mean X?`, or nothing when no known word is near."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""


def settle(flags: Mapping[str, str], environment: Mapping[str, str], file: Path | None = None) -> Settings:
    """The settings of a server. `flags` by setting name, as text. Raises ConfigError."""
    given: dict[str, Value] = {}
    if file is not None:
        given |= read_file(file)
    given |= _read_environment(environment)
    given |= {name: ROWS[name].kind.given(ROWS[name].flag, text) for name, text in flags.items()}
    return Settings(**given)


def _read_environment(environment: Mapping[str, str]) -> dict[str, Value]:
    """What SERAC_* says. A variable unlike every setting is someone else's; one that is nearly one is a slip."""
    known = {row.variable: row for row in ROWS.values()}
    given = {}
    for variable in sorted(environment):
        if variable in known:
            given[known[variable].name] = known[variable].kind.given(variable, environment[variable])
        elif variable.startswith(PREFIX):
            near = difflib.get_close_matches(variable, known, n=1, cutoff=0.85)
            if near:
                raise ConfigError(f"{variable}: unknown variable; did you mean {near[0]}?", field=variable)
    return given


def read_file(path: Path) -> dict[str, Value]:
    """The settings in a TOML file. Raises ConfigError with file:line:column."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"--config: got {path}; expected a readable file ({error.strerror})", field="config"
        ) from None
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        column = error.start - data.rfind(b"\n", 0, error.start)
        raise ConfigError(f"{path}:{line}:{column}: got bytes that are not UTF-8; expected UTF-8 text") from None
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}:{toml_place(str(error), text)}") from None
    if not table:
        raise ConfigError(f"{path}:1:1: got an empty file; expected settings such as mesh = 'tp=4'")
    return {key: _read_key(path, text, key, value) for key, value in table.items()}


def _read_key(path: Path, text: str, key: str, value: object) -> Value:
    match = re.search(rf"^[ \t]*(?:\[+[ \t]*)?[\"']?({re.escape(key)})\b", text, re.MULTILINE)
    start = match.start(1) if match else 0
    place = f"{path}:{text.count(chr(10), 0, start) + 1}:{start - text.rfind(chr(10), 0, start)}"
    if key not in ROWS:
        raise ConfigError(f"{place}: {key}: unknown key{suggestion(key, ROWS)}", field=key)
    if isinstance(value, bool):
        value = str(value).lower()
    elif isinstance(value, (dict, list)):
        expected = ROWS[key].kind.expected
        raise ConfigError(f"{place}: {key}: got a {type(value).__name__}; expected {expected}", field=key)
    return ROWS[key].kind.given(f"{place}: {key}", str(value))


def toml_place(message: str, text: str) -> str:
    """`line:column: what is wrong`, from the message of tomllib."""
    match = TOML_PLACE.match(message)
    if match is None:
        return f"1:1: {message}"
    line, column = match[2], match[3]
    if line is None:
        lines = text.splitlines() or [""]
        line, column = str(len(lines)), str(len(lines[-1]) + 1)
    return f"{line}:{column}: {match[1]}"
