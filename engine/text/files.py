"""Reads what a model folder says about its text: special tokens, EOS ids, generation defaults, chat template.

The files are data in Hugging Face form: nothing in them is imported, and a value of the wrong type is refused by
file and key. Cost: a few reads of small JSON files, at load.
"""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

from engine.errors import ModelError, wrong

Json = Mapping[str, object]

SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

# Keys of generation_config.json that become a request's defaults: whether whole, a test, words for what passes it.
# max_new_tokens is not among them: a request that names no max_tokens gets the rest of the context.
DEFAULTS: dict[str, tuple[bool, Callable[[float], bool], str]] = {
    "temperature": (False, lambda x: 0 <= x <= 100, "a finite number in 0..100"),
    "top_k": (True, lambda x: -1 <= x < 2**31, "an integer >= -1"),
    "top_p": (False, lambda x: 0 < x <= 1, "a finite number in (0, 1]"),
    "min_p": (False, lambda x: 0 <= x <= 1, "a finite number in 0..1"),
    "repetition_penalty": (False, lambda x: 0 < x <= 100, "a finite number > 0 and <= 100"),
}


def read_bytes(path: Path) -> bytes:
    """The content of a file that must be there. Raises ModelError, naming path and cause."""
    if not path.is_file():
        raise ModelError(f"{path}: {'not a regular file' if path.exists() else 'missing'}; expected a file to read")
    try:
        return path.read_bytes()
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from error


def read_text(path: Path) -> str:
    """The same, as UTF-8."""
    try:
        return read_bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ModelError(f"{path}: not UTF-8 at byte {error.start}") from error


def read_json(path: Path) -> Json:
    """The JSON object in a file, or an empty one where there is no file."""
    if not path.exists() and not path.is_symlink():
        return {}
    text = read_text(path)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: got {type(value).__name__}; expected a JSON object")
    return value


def eos_ids(folder: Path, token_id: Callable[[str], int | None], special: Mapping[str, str]) -> tuple[int, ...]:
    """Every id that ends a sequence: those of generation_config.json and config.json, else the tokenizer's own."""
    found: dict[int, None] = {}
    for name in ("generation_config.json", "config.json"):
        value = read_json(folder / name).get("eos_token_id")
        for token in value if isinstance(value, list) else [] if value is None else [value]:
            if isinstance(token, bool) or not isinstance(token, int) or token < 0:
                raise ModelError(wrong(f"{folder / name}: eos_token_id", token, "a token id or a list of them"))
            found[token] = None
    if not found and (own := token_id(special.get("eos_token", ""))) is not None:
        found[own] = None
    return tuple(found)


def defaults(folder: Path) -> dict[str, float]:
    """The sampling defaults that generation_config.json states; `do_sample: false` makes them greedy."""
    path = folder / "generation_config.json"
    config = read_json(path)
    found: dict[str, float] = {}
    for key, (whole, holds, expected) in DEFAULTS.items():
        if (value := config.get(key)) is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
            raise ModelError(wrong(f"{path}: {key}", value, expected))
        if not math.isfinite(value) or not holds(value):
            raise ModelError(wrong(f"{path}: {key}", value, expected))
        found[key] = value
    return found | ({"temperature": 0.0} if config.get("do_sample") is False else {})


def special_tokens(folder: Path) -> dict[str, str]:
    """Special tokens by the names that a chat template knows, such as bos_token; names without one are absent."""
    path = folder / "tokenizer_config.json"
    config = dict(read_json(folder / "special_tokens_map.json")) | dict(read_json(path))
    found: dict[str, str] = {}
    for name in SPECIAL_NAMES:
        value = config.get(name)
        content = value.get("content") if isinstance(value, dict) else value
        if content is None:
            continue
        if not isinstance(content, str):
            raise ModelError(wrong(f"{path}: {name}", content, "a string or an object with a content"))
        found[name] = content
    return found


def chat_template(folder: Path) -> tuple[Path, str] | None:
    """The file that holds the chat template, and its source; None for a model without one.

    chat_template.jinja wins over the chat_template of tokenizer_config.json; of several, the one named default.
    """
    path = folder / "chat_template.jinja"
    if path.exists():
        return path, read_text(path)
    path = folder / "tokenizer_config.json"
    value = read_json(path).get("chat_template")
    if isinstance(value, list):
        named = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
        value = named.get("default")
    if value is None:
        return None
    if not isinstance(value, str):
        raise ModelError(f"{path}: chat_template: got {type(value).__name__}; expected a string")
    return path, value
