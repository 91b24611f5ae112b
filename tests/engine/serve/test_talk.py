"""`serac generate` and `serac chat` against a running server, by the command line's own functions."""

import io
import json

import pytest

from engine import cli, talk
from engine.errors import ConfigError
from engine.serve.client import Client


def run(server, capsys, *arguments: str) -> tuple[int, str, str]:
    code = cli.main([*arguments, "--server", server[1][0]])
    streams = capsys.readouterr()
    return code, streams.out, streams.err


def test_generate_writes_the_text_and_nothing_else(server, capsys):
    assert run(server, capsys, "generate", "ab", "--max-tokens", "3") == (0, "abc\n", "")


def test_every_option_of_generate_reaches_the_core(server, capsys):
    numbers = {"temperature": 0.5, "top-k": 3, "top-p": 0.5, "min-p": 0.1, "seed": 5, "n": 2, "logprobs": 1}
    numbers |= {"prompt-logprobs": 2, "repetition-penalty": 1.5, "frequency-penalty": -1, "presence-penalty": 1}
    numbers |= {"max-tokens": 4, "min-tokens": 2, "stop-token-ids": 7, "timeout": "1m", "model": "tiny"}
    options = [f"--{name}={value}" for name, value in numbers.items()]
    options += ["--stop", "x", "--stop", "y", "--include-stop", "--ignore-eos"]
    code, out, _ = run(server, capsys, "generate", "ab", *options)
    assert code == 0 and out == "abcd\n--- choice 1\nabcd\n"
    request = server[0].opened[-1]
    sampling, stopping = request.sampling, request.stopping
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p) == (0.5, 3, 0.5, 0.1)
    assert (sampling.seed, sampling.n, sampling.logprobs, sampling.prompt_logprobs) == (5, 2, 1, 2)
    assert (sampling.repetition_penalty, sampling.frequency_penalty, sampling.presence_penalty) == (1.5, -1, 1)
    assert (stopping.max_tokens, stopping.min_tokens, stopping.stop, stopping.stop_token_ids) == (
        4,
        2,
        ("x", "y"),
        (7,),
    )
    assert stopping.include_stop and stopping.ignore_eos and request.deadline_at is not None


def test_json_holds_the_whole_answer(server, capsys):
    code, out, _ = run(server, capsys, "generate", "ab", "--max-tokens", "2", "--seed", "9", "--json")
    answer = json.loads(out)
    assert (code, answer["seed"], answer["revision"]) == (0, 9, "r1")
    assert answer["choices"][0]["text"] == "ab" and answer["choices"][0]["usage"]["completionTokens"] == "2"


def test_a_refusal_is_one_line_with_the_code_of_its_error(server, capsys):
    code, out, err = run(server, capsys, "generate", "ab", "--temperature", "-1")
    assert (code, out) == (
        2,
        "",
    ) and err == "serac: error: temperature: got -1.0; expected a finite number in 0..100\n"
    code, _, err = run(server, capsys, "generate", "ab", "--model", "large")
    assert code == 2 and err.startswith("serac: error: model: got 'large'; expected") and err.count("\n") == 1


def test_a_server_that_is_not_there_ends_with_69(capsys):
    assert cli.main(["generate", "ab", "--server", "127.0.0.1:1"]) == 69
    assert capsys.readouterr().err.startswith("serac: error: ")


def test_a_chat_remembers_its_turns_until_it_is_reset(server):
    replica, (public, _) = server
    out = io.StringIO()
    lines = io.StringIO("hi\n\nmore\n/reset\nnew\n/exit\nnever\n")
    with Client(public) as client:
        assert talk.chat(client, "be kind", {"max_tokens": 2}, lines, out) == 0
    prompts = ["".join(map(chr, request.prompt_ids)) for request in replica.opened[-3:]]
    assert prompts == [
        "<system>be kind<user>hi>",
        "<system>be kind<user>hi<assistant>ab<user>more>",
        "<system>be kind<user>new>",
    ]
    assert out.getvalue() == "ab\nab\nab\n"


def test_a_token_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ConfigError, match="token_file"):
        talk.connect("127.0.0.1:1", tmp_path / "none", None)
    (tmp_path / "empty").touch()
    with pytest.raises(ConfigError, match="token_file"):
        talk.connect("127.0.0.1:1", tmp_path / "empty", None)
