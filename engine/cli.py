"""The command `serac`: one function a verb, each calling into a module that is imported only then.

    serac serve | generate | chat | plan | convert | bench | demo | version

A mistake is answered in one line, `serac: error: FIELD: got X; expected Y`, with the exit code of its error. The
command line is the one place that sets XLA_FLAGS and JAX_PLATFORMS: it starts itself anew with them, and says so.
"""

import argparse
import importlib.metadata
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

from engine import config, environment
from engine.config import suggestion
from engine.core.request import NUMBERS
from engine.errors import ConfigError, SeracError

DISTRIBUTION = "serac"
VERSIONS = ("serac", "jax", "jaxlib", "flax", "orbax-checkpoint", "grpcio", "protobuf", "numpy")
INTERRUPTED = 130


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


class Verb(NamedTuple):
    """A subcommand. `run` gets its options and all arguments of the command; returns the exit code."""

    name: str
    help: str
    add: Callable[[Parser], None]
    run: Callable[[argparse.Namespace], int]


def add_settings(parser: Parser) -> None:
    """MODEL and a flag for every row of config.Settings."""
    parser.add_argument("model", nargs="?", action=Once, default=argparse.SUPPRESS, metavar="MODEL",
                        help=config.ROWS["model"].help)  # fmt: skip
    parser.add_argument("--config", metavar="FILE.toml", type=Path, help="settings by the same names")
    for row in config.ROWS.values():
        if row.name == "model":
            continue
        shown = "" if row.default is None else f" (default {str(row.default).lower()})"
        extra = {"nargs": "?", "const": "true"} if row.kind is config.SWITCH else {}
        parser.add_argument(row.flag, dest=row.name, action=Once, default=argparse.SUPPRESS, help=row.help + shown,
                            metavar=row.kind.metavar, **extra)  # fmt: skip


def read_settings(options: argparse.Namespace) -> config.Settings:
    """Flags over SERAC_* over the file over defaults."""
    flags = {name: text for name, text in vars(options).items() if name in config.ROWS}
    return config.settle(flags, os.environ, getattr(options, "config", None))


def start_anew(settings: config.Settings) -> None:
    """Replace this process by one whose environment JAX will understand; returns when nothing is missing."""
    wanted = environment.needed(settings.device, settings.mesh, os.environ)
    if wanted:
        words = " ".join(f"{name}={value}" for name, value in wanted.items())
        print(f"serac: set {words}", file=sys.stderr, flush=True)
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **wanted})


def serve(options: argparse.Namespace) -> int:
    """Serve a model until it is drained."""
    settings = read_settings(options)
    start_anew(settings)
    from engine import launch

    return launch.serve(settings, version(), sys.stdout)


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
    names = ("model", "max_tokens", "stop", "stop_token_ids", "include_stop", "ignore_eos", "timeout_s")
    fields = {name: getattr(options, name) for name in (*names, *(row.field for row in NUMBERS))}
    if fields["timeout_s"] is not None:
        try:
            fields["timeout_s"] = config.TIME.read(fields["timeout_s"])
        except ValueError:
            expected = config.TIME.expected
            raise ConfigError(f"--timeout: got {fields['timeout_s']!r:.64}; expected {expected}") from None
    return {name: value for name, value in fields.items() if value is not None}


def add_generate(parser: Parser) -> None:
    """A prompt and the client's options."""
    parser.add_argument("prompt", metavar="PROMPT", help="text, or - to read standard input")
    parser.add_argument("--json", action="store_true", help="write the whole answer as JSON")
    add_client(parser)


def generate(options: argparse.Namespace) -> int:
    """Ask a server to go on with a text."""
    from engine import talk

    prompt = sys.stdin.read() if options.prompt == "-" else options.prompt
    with talk.connect(options.server, options.token_file, options.tls_ca) as client:
        return talk.generate(client, prompt, read_client(options), as_json=options.json, out=sys.stdout)


def add_chat(parser: Parser) -> None:
    """A system message and the client's options."""
    parser.add_argument("--system", default="", metavar="TEXT", help="what the model is told first")
    add_client(parser)


def chat(options: argparse.Namespace) -> int:
    """Talk with a server, a line a turn."""
    from engine import talk

    with talk.connect(options.server, options.token_file, options.tls_ca) as client:
        return talk.chat(client, options.system, read_client(options), sys.stdin, sys.stdout)


def add_nothing(parser: Parser) -> None:
    """No options."""


def demo(options: argparse.Namespace) -> int:
    """Serve the embedded model and ask it."""
    from engine import demo

    return demo.run(sys.stdout)


def version(name: str = DISTRIBUTION) -> str:
    """The installed version of a distribution."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def show_version(options: argparse.Namespace) -> int:
    """Versions of what matters, read without importing any of it."""
    for name in VERSIONS:
        print(f"{name} {version(name)}")
    print(f"python {sys.version.split()[0]}")
    return 0


VERBS = (
    Verb("serve", "serve a model over gRPC", add_settings, serve),
    Verb("generate", "ask a running server to go on with a text", add_generate, generate),
    Verb("chat", "talk with a running server", add_chat, chat),
    Verb("demo", "serve the embedded model on this machine and ask it", add_nothing, demo),
    Verb("version", "print versions", add_nothing, show_version),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        return run(arguments)
    except SeracError as error:
        print(f"serac: error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def run(arguments: Sequence[str]) -> int:
    """Find the verb, read its options, run it. Raises ConfigError."""
    verbs = {verb.name: verb for verb in VERBS}
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        return show_version(argparse.Namespace())
    name = arguments[0]
    if name not in verbs:
        raise ConfigError(
            f"{name}: unknown command{suggestion(name, verbs) or '; see serac --help'}", field="command"
        )
    verb = verbs[name]
    parser = Parser(prog=f"serac {name}", description=verb.run.__doc__)
    verb.add(parser)
    return verb.run(parser.read(arguments[1:]))


def usage() -> str:
    """The list of verbs."""
    width = max(len(verb.name) for verb in VERBS)
    lines = [f"  {verb.name:<{width}}  {verb.help}" for verb in VERBS]
    return "\n".join(["usage: serac COMMAND [options]", "", *lines, "", "serac COMMAND --help says more."])


if __name__ == "__main__":
    sys.exit(main())
