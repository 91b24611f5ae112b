"""Decides which texts the embedded model learns: Python's own standard library, as files and as short chats.

    *.py files -> readable sources -> split by a hash of the path -> training documents | held-out documents

Each split has the files themselves and chats about their functions; a held-out file gives no chat to
training. Cost: a few seconds, most of them in `ast.parse`.
"""

import ast
import hashlib
import random
import sysconfig
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

END_OF_TEXT = "<|endoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, TURN_START, TURN_END)

SYSTEM_TEXT = "You write Python in the manner of its standard library."
HELD_OUT_PERCENT = 3
SHARE_OF_FUNCTIONS = 0.35
FUNCTION_CHARS = range(60, 2400)

# Tests are repetitive; the other entries hold tables or facts of one machine, not code that a person wrote.
SKIPPED_FOLDERS = frozenset(
    {"site-packages", "test", "tests", "idle_test", "pydoc_data", "__pycache__", "ensurepip"}
)
SKIPPED_PATHS = ("_sysconfigdata", "config-", "html/entities.py", "msilib/schema.py", "this.py")
SKIPPED_MARKS = ("decoding_table =", "decoding_map =", "_codecs_")


@dataclass(frozen=True)
class Corpus:
    """Documents as text, without the closing <|endoftext|>."""

    training: list[str]
    held_out: list[str]


def standard_library() -> Path:
    """The folder of the running interpreter's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def collect(root: Path, seed: int) -> Corpus:
    """Reads the sources under `root`; the same root and seed give the same documents in the same order."""
    rng = random.Random(seed)
    training, held_out = [], []
    for name, text in sources(root):
        documents = held_out if is_held_out(name) else training
        documents.append(text)
        documents.extend(chats(text, rng))
    rng.shuffle(training)
    return Corpus(training, held_out)


def sources(root: Path) -> Iterator[tuple[str, str]]:
    """Relative path and text of every source worth learning, in the order of the paths."""
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        name = relative.as_posix()
        if SKIPPED_FOLDERS.intersection(relative.parts) or name.startswith(SKIPPED_PATHS):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        is_table = name.startswith("encodings/") and any(mark in text for mark in SKIPPED_MARKS)
        if text.strip() and not is_table and not any(token in text for token in SPECIAL_TOKENS):
            yield name, text


def is_held_out(name: str) -> bool:
    """Whether a file is kept from training; a hash of its path decides, whatever the Python version."""
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:4], "big") % 100 < HELD_OUT_PERCENT


def chats(text: str, rng: random.Random) -> Iterator[str]:
    """Chats of one to three turns in which the assistant answers with functions of this source."""
    exchanges = [(rng.choice(questions), answer) for questions, answer in functions(text)]
    exchanges = [exchange for exchange in exchanges if rng.random() < SHARE_OF_FUNCTIONS]
    rng.shuffle(exchanges)
    while exchanges:
        turns = exchanges[: rng.choice((1, 1, 2, 3))]
        del exchanges[: len(turns)]
        messages = [("system", SYSTEM_TEXT)] if rng.random() < 0.2 else []
        for question, answer in turns:
            messages += [("user", question), ("assistant", answer)]
        yield render(messages)


def functions(text: str) -> Iterator[tuple[list[str], str]]:
    """The questions that a function's source answers, and that source, moved to the left margin."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return
    lines = text.splitlines()
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        source = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno]))
        if len(source) not in FUNCTION_CHARS or not source.startswith(("def ", "async def ")):
            continue
        questions = [f"Write the function {node.name}.", f"Complete: {source.splitlines()[0]}"]
        summary = (ast.get_docstring(node) or "").strip().split("\n")[0].strip()
        if summary:
            questions.append(f"Write the function {node.name}. {summary}")
        yield questions, source


def render(messages: list[tuple[str, str]]) -> str:
    """A chat as the template in tokenizer_config.json prints it, up to the end of the last turn."""
    return "\n".join(f"{TURN_START}{role}\n{text}{TURN_END}" for role, text in messages)
