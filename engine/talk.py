"""`serac generate` and `serac chat`: a client at the terminal.

Text goes to standard output as it comes; what is said about it goes to standard error, so that output can be piped.
"""

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TextIO

from google.protobuf.json_format import MessageToDict

from engine.errors import ConfigError
from engine.serve.calls import Parameter, Prompt, Reply, join
from engine.serve.client import Client

QUIT = ("/exit", "/quit")
RESET = "/reset"


def connect(server: str, token_file: Path | None, tls_ca: Path | None) -> Client:
    """A client of the server at `server`."""
    try:
        token = token_file.read_text().split()[0] if token_file else None
        return Client(server, token=token, tls_ca=tls_ca.read_bytes() if tls_ca else None)
    except (OSError, IndexError) as error:
        field = "token_file" if token_file else "tls_ca"
        raise ConfigError(f"{field}: cannot be read: {error}", field=field) from None


def generate(
    client: Client, prompt: Prompt, parameters: Mapping[str, Parameter], *, as_json: bool, out: TextIO
) -> int:
    """Write the answer to `out`: the text of the first choice as it comes, or everything as JSON at the end."""
    if as_json:
        print(json.dumps(plain(client.generate(prompt, **parameters))), file=out)
        return 0
    parts = list(_printed(client.stream(prompt, **parameters), out))
    print(file=out, flush=True)
    reply = join(parts)
    for choice in reply.choices[1:] if reply else ():
        print(f"--- choice {choice.index}\n{choice.text}", file=out)
    _summary(reply)
    return 0


def chat(client: Client, system: str, parameters: Mapping[str, Parameter], lines: TextIO, out: TextIO) -> int:
    """A conversation until end of input: each line is the user's turn, the answer the assistant's."""
    start = [{"role": "system", "content": system}] if system else []
    messages = list(start)
    prompted = lines.isatty()
    if prompted:
        print(f"{RESET} begins anew, {QUIT[0]} or end of input leaves", file=sys.stderr)
    while True:
        if prompted:
            print("> ", end="", file=out, flush=True)
        line = lines.readline()
        words = line.strip()
        if not line or words in QUIT:
            return 0
        if words == RESET:
            messages = list(start)
        elif words:
            messages.append({"role": "user", "content": words})
            reply = join(_printed(client.stream(messages, **parameters), out))
            print(file=out, flush=True)
            messages.append({"role": "assistant", "content": reply.text if reply else ""})


def plain(reply: Reply) -> dict:
    """A reply as JSON can hold it."""
    table = asdict(reply)
    for choice in table["choices"]:
        choice["usage"] = MessageToDict(choice["usage"]) if choice["usage"] is not None else None
        choice["logprobs"] = [MessageToDict(entry) for entry in choice["logprobs"]]
    table["prompt_logprobs"] = [MessageToDict(entry) for entry in reply.prompt_logprobs]
    return table


def _printed(parts: Iterator[Reply], out: TextIO) -> Iterator[Reply]:
    for part in parts:
        print(part.text, end="", file=out, flush=True)
        yield part


def _summary(reply: Reply | None) -> None:
    if reply is None or not sys.stderr.isatty():
        return
    for choice in reply.choices:
        usage = choice.usage
        counts = f"{usage.prompt_tokens} + {usage.completion_tokens} tokens" if usage else "no usage"
        words = f"[{choice.finish_reason}; {counts}; seed {reply.seed}; {reply.model} {reply.revision}]"
        print(words, file=sys.stderr)
