"""Objects as YAML text, the plainest there is: block style, every string in double quotes, long ones as they are.

{"a": {"b": [1, "x"]}}  ->  a:
                              b:
                                - 1
                                - "x"
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

PLAIN = re.compile(r"[A-Za-z][\w./-]*", re.ASCII)
BOOLEAN = re.compile(r"y|n|yes|no|on|off|true|false|null", re.IGNORECASE)

Tree = Mapping[str, "Tree"] | Sequence["Tree"] | str | int | bool


def yaml_of(objects: Sequence[Tree]) -> str:
    """All objects, one document each."""
    return "".join("---\n" + "".join(f"{line}\n" for line in _lines(each)) for each in objects)


def _lines(tree: Tree) -> Iterator[str]:
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _under(_key(key) + ":", value)
    elif isinstance(tree, str) or not isinstance(tree, Sequence):
        yield _scalar(tree)
    else:
        for value in tree:
            first, *rest = _lines(value) if value not in ({}, []) else [_scalar(value)]
            yield f"- {first}"
            yield from _indented(rest)


def _under(head: str, value: Tree) -> Iterator[str]:
    if isinstance(value, str) and _as_it_is(value):
        yield f"{head} |"
        yield from _indented(value.removesuffix("\n").split("\n"))
    elif isinstance(value, str | int | bool) or not value:
        yield f"{head} {_scalar(value)}"
    else:
        yield head
        yield from _indented(_lines(value))


def _indented(lines: Iterable[str]) -> Iterator[str]:
    yield from (f"  {line}" if line else "" for line in lines)


def _as_it_is(text: str) -> bool:
    """Whether a literal block gives it back: lines that show, one newline at the end, none before."""
    lines = text.split("\n")
    ends = len(lines) > 2 and not lines[-1] and lines[-2] != "" and lines[0] != "" and not lines[0].startswith(" ")
    return ends and all(line.isprintable() for line in lines)


def _key(key: str) -> str:
    return key if PLAIN.fullmatch(key) and not BOOLEAN.fullmatch(key) else _scalar(key)


def _scalar(value: Tree) -> str:
    """As JSON, which YAML reads; what does not show is escaped, since YAML takes some of it for a new line."""
    text = json.dumps(value, ensure_ascii=False)
    return "".join(each if each.isprintable() else f"\\U{ord(each):08x}" for each in text)
