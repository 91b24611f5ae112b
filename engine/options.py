"""Options of the command line: a parser whose mistakes are ConfigErrors with a suggestion, and groups of options.

The flags of a server are the rows of engine/config.py; those of a request are the rows of engine/core/request.py.
"""

import argparse
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NoReturn

from engine import config
from engine.config import suggestion
from engine.core.request import NUMBERS
from engine.errors import ConfigError

CONFIG_VARIABLE = "SERAC_CONFIG"
REQUEST_FIELDS = ("model", "max_tokens", "stop", "stop_token_ids", "include_stop", "ignore_eos", "timeout_s")


class Once(argparse.Action):
    """An option that may be given once."""

    def __call__(self, parser, namespace, values, option_string=None):
        """Store the text, or refuse."""
        if hasattr(namespace, self.dest):
            parser.error(f"{option_string or self.dest}: got it twice; expected it once")
        setattr(namespace, self.dest, values)


class Parser(argparse.ArgumentParser):
    """argparse whose mistakes are ConfigErrors; it knows its options, to suggest the nearest."""

    def __init__(self, *arguments, **keywords):
        self.known: list[str] = []
        super().__init__(*arguments, allow_abbrev=False, **keywords)

    def add_argument(self, *names, **keywords):
        """Keep the spelling of each option."""
        self.known += [name for name in names if name.startswith("--")]
        return super().add_argument(*names, **keywords)

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing usage and leaving."""
        raise ConfigError(message.removeprefix("argument "))

    def read(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Raises ConfigError with a suggestion for an option that is not there."""
        options, unknown = self.parse_known_args(list(arguments))
        if unknown:
            word = unknown[0].split("=")[0]
            kind = "option" if word.startswith("-") else "argument"
            raise ConfigError(f"{word}: unknown {kind}{suggestion(word, self.known)}", field=word)
        return options


def add_settings(parser: Parser, names: Iterable[str] = config.ROWS) -> None:
    """MODEL, --config and a flag for each setting of `names`."""
    parser.add_argument("model", nargs="?", action=Once, default=argparse.SUPPRESS, metavar="MODEL",
                        help=config.ROWS["model"].help)  # fmt: skip
    parser.add_argument(
        "--config", metavar="FILE.toml", type=Path, help=f"settings by the same names; also {CONFIG_VARIABLE}"
    )
    for row in (config.ROWS[name] for name in names):
        if row.name == "model":
            continue
        shown = "" if row.default is None else f" (default {str(row.default).lower()})"
        extra = {"nargs": "?", "const": "true"} if row.kind is config.SWITCH else {}
        parser.add_argument(row.flag, dest=row.name, action=Once, default=argparse.SUPPRESS, help=row.help + shown,
                            metavar=row.kind.metavar, **extra)  # fmt: skip


def read_settings(options: argparse.Namespace) -> config.Settings:
    """Flags over SERAC_* over the file over defaults."""
    flags = {name: text for name, text in vars(options).items() if name in config.ROWS}
    file = options.config or os.environ.get(CONFIG_VARIABLE)
    return config.settle(flags, os.environ, Path(file) if file else None)


def add_client(parser: Parser) -> None:
    """Where the server is, and every field of a request."""
    parser.add_argument(
        "--server", default="127.0.0.1:50051", metavar="HOST:PORT", help="address (default %(default)s)"
    )
    parser.add_argument("--token-file", type=Path, metavar="PATH", help="file that holds the bearer token")
    parser.add_argument("--tls-ca", type=Path, metavar="PATH", help="PEM root certificates; turns TLS on")
    parser.add_argument("--model", help="model name; default: the one served")
    parser.add_argument("--timeout", dest="timeout_s", metavar="TIME", help="deadline of the call: 30, 1.5s, 5m")
    parser.add_argument("--max-tokens", type=_number(int), metavar="N", help="default: the rest of the context")
    for row in NUMBERS:
        parser.add_argument(f"--{row.field.replace('_', '-')}", type=_number(int if row.whole else float),
                            metavar="N" if row.whole else "X", help=row.expected)  # fmt: skip
    parser.add_argument("--stop", action="append", metavar="TEXT", help="ends the output; may be given again")
    parser.add_argument(
        "--stop-token-ids", action="append", type=_number(int), metavar="ID", help="the same for tokens"
    )
    parser.add_argument(
        "--include-stop", action="store_true", default=None, help="what stopped it stays in the output"
    )
    parser.add_argument(
        "--ignore-eos", action="store_true", default=None, help="end-of-sequence tokens do not end it"
    )


def add_admin(parser: Parser) -> None:
    """Where the admin listener is, and what opens it."""
    parser.add_argument(
        "--server", default="127.0.0.1:50052", metavar="HOST:PORT", help="its admin address (default %(default)s)"
    )
    parser.add_argument("--token-file", type=Path, metavar="PATH", help="file that holds the bearer token")
    parser.add_argument("--tls-ca", type=Path, metavar="PATH", help="PEM root certificates; turns TLS on")


def add_top(parser: Parser) -> None:
    """Where the admin listener is, and how long to watch."""
    add_admin(parser)
    parser.add_argument("--once", action="store_true", help="one moment instead of one each second")


def add_status(parser: Parser) -> None:
    """Where the admin listener is, and for whom the answer is."""
    add_admin(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")


def add_restart(parser: Parser) -> None:
    """Which lanes, how long each may drain, and where the admin listener is."""
    parser.add_argument("lanes", nargs="*", metavar="LANE", help="such as d1 (default: all)")
    parser.add_argument("--drain", metavar="TIME", help="how long a lane may take to end what it serves; the rest "
                        "goes on elsewhere (default: the drain time of the server)")  # fmt: skip
    add_admin(parser)


def add_drain(parser: Parser) -> None:
    """How long, and where the admin listener is."""
    parser.add_argument("--timeout", metavar="TIME", help="for open streams (default: the server's drain time)")
    add_admin(parser)


def _number(kind: type) -> Callable[[str], float]:
    def read(text: str) -> float:
        try:
            return kind(text)
        except ValueError:
            expected = "an integer" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"got {text!r:.64}; expected {expected}") from None

    return read


def read_client(options: argparse.Namespace) -> dict:
    """The request's fields that were given."""
    fields = {name: getattr(options, name) for name in (*REQUEST_FIELDS, *(row.field for row in NUMBERS))}
    fields["timeout_s"] = config.TIME.given("--timeout", fields["timeout_s"])
    return {name: value for name, value in fields.items() if value is not None}
