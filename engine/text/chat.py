"""Renders messages with the model's chat template, and tells its special tokens from the messages' own text.

A template writes special tokens as plain text, so after rendering `<|im_end|>` from the template and `<|im_end|>`
from a message look alike. Three moves keep them apart:

    guard    before rendering, a break character goes in front of every place in a message where a special token's
             text starts, or could start and go on in the next message; neither messages nor template hold it
    mark     after rendering, MARK goes in front of every special token's text that has no break in front of it
    unguard  the breaks are taken out

`engine/text/text.py` encodes the result with a tokenizer whose special tokens are spelled MARK + text: those of the
template become ids, those of a message stay text. A message that spells MARK before such a text is refused. All
else renders as in Hugging Face's environment, whose settings and functions these are. Templates come from the model
folder alone, run in a sandbox that changes nothing, and may write 1 MiB beyond twice what the messages hold.
Cost: linear in the text.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from os.path import commonprefix
from pathlib import Path
from typing import NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from engine.errors import InvalidArgument, ModelError, shown

Message = Mapping[str, str]

MARK = "\ufdd0"  # a noncharacter: Unicode gives it no meaning in text
BREAKS = (0xF0000, 0xFFFFD)  # a plane for private use
MAX_ADDED_CHARS = 1 << 20

# Everything that running a template can raise on the messages of a client or by its own mistake.
FAILURES = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    ArithmeticError,
    AttributeError,
    RecursionError,
)


def refuse(message: str) -> NoReturn:
    """`raise_exception` of a template: the messages are not as the model wants them."""
    raise jinja2.TemplateError(message)


def to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """The `tojson` of chat templates: as it is, where jinja2's own escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def without_generation_tags(source: str) -> str:
    """A template whose {% generation %} blocks, which mark text for training, are blocks that always hold."""
    source = re.sub(r"({%[-+]?\s*)generation(\s*[-+]?%})", r"\1if true\2", source)
    return re.sub(r"({%[-+]?\s*)endgeneration(\s*[-+]?%})", r"\1endif\2", source)


def check_messages(messages: object) -> list[Message]:
    """Raise InvalidArgument unless `messages` is a list of objects with a role and a content."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise InvalidArgument("messages: got none; expected a list of at least one message", field="messages")
    for k, message in enumerate(messages):
        if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
            raise InvalidArgument(f"messages[{k}]: expected an object with role and content", field="messages")
        for key, value in message.items():
            if not isinstance(value, str):
                found = f"messages[{k}].{key}: got {type(value).__name__}"
                raise InvalidArgument(f"{found}; expected a string", field="messages")
    return list(messages)


def one_of(words: set[str]) -> str:
    """A pattern for the longest of `words` that starts at a place: a tree, so that a thousand words cost as one."""
    start = commonprefix(sorted(words))
    rests = {word[len(start) :] for word in words}
    if rests == {""}:
        return re.escape(start)
    heads = sorted({rest[0] for rest in rests if rest})
    branches = "|".join(one_of({rest for rest in rests if rest[:1] == head}) for head in heads)
    return f"{re.escape(start)}(?:{branches}){'?' if '' in rests else ''}"


class SpecialText:
    """Finds the text of special tokens in a longer text."""

    def __init__(self, contents: Iterable[str]):
        words = {content for content in contents if content}
        self._one = one_of(words) if words else "(?!)"
        self._anywhere = re.compile(f"(?=(?:{self._one}))")
        self._marked = re.compile(f"{MARK}(?:{self._one})")
        self._starts = frozenset(word[:n] for word in words for n in range(1, len(word)))
        self._longest = max(map(len, words), default=0)

    def guard(self, text: str, break_char: str) -> str:
        """`text` with a break before each special token's text, and before an end that could become one."""
        for k in range(len(text) - 1, max(len(text) - self._longest, -1), -1):
            if text[k:].replace(break_char, "") in self._starts:
                text = text[:k] + break_char + text[k:]
        return self._anywhere.sub(break_char, text)

    def mark(self, rendered: str, break_char: str) -> str:
        """`rendered` without its breaks and with MARK before each special token's text that had none."""
        text, count = re.subn(f"(?<!{break_char})({self._one})", rf"{MARK}\1", rendered)
        text = text.replace(break_char, "")
        if len(self._marked.findall(text)) != count:
            message = "messages: U+FDD0 stands before a special token's text; expected messages without it"
            raise InvalidArgument(message, field="messages")
        return text


class ChatTemplate:
    """A compiled chat template. Immutable; `render` may run in several threads."""

    def __init__(
        self,
        path: Path,
        source: str,
        special: Mapping[str, str],
        contents: Iterable[str],
        now: Callable[[], datetime],
    ):
        """special: names such as bos_token; contents: the text of every special token. Raises ModelError."""
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = to_json
        environment.globals["raise_exception"] = refuse
        environment.globals["strftime_now"] = lambda form: now().strftime(form)
        try:
            self._template = environment.from_string(without_generation_tags(source))
        except jinja2.TemplateSyntaxError as error:
            raise ModelError(f"{path}: chat template, line {error.lineno}: {error.message}") from error
        self._source_chars = frozenset(source)
        self._special = dict(special)
        self._texts = SpecialText(contents)

    def render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        """The text of a conversation, MARK before each special token that the template wrote.

        Raises InvalidArgument for messages that the template does not take.
        """
        checked = check_messages(messages)
        taken = self._source_chars.union(*(value for message in checked for value in message.values()))
        break_char = next(c for c in map(chr, range(*BREAKS)) if c not in taken)
        guarded = [{key: self._texts.guard(text, break_char) for key, text in m.items()} for m in checked]
        limit = MAX_ADDED_CHARS + 2 * sum(len(text) for message in guarded for text in message.values())
        return self._texts.mark(self._run(guarded, add_generation_prompt, limit), break_char)

    def _run(self, messages: list[dict[str, str]], add_generation_prompt: bool, limit: int) -> str:
        pieces: list[str] = []
        length = 0
        try:
            for piece in self._template.generate(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._special,
            ):
                pieces.append(piece)
                if (length := length + len(piece)) > limit:
                    raise ValueError(f"it wrote more than {limit} characters")
        except FAILURES as error:
            message = f"messages: the model's chat template refused them: {shown(str(error))}"
            raise InvalidArgument(message, field="messages") from error
        return "".join(pieces)
