"""Seen from outside: a client that is not ours, and a server process under signals."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from engine import demo
from engine.errors import Unavailable
from engine.serve.client import Client

ROOT = Path(__file__).parents[3]
SERVE = """
import asyncio, sys
sys.path[:0] = {paths}
from fake_replica import FakeReplica
from engine import banner
from engine.clock import SystemClock
from engine.serve import process
from engine.serve.server import Listen, Server

async def main():
    replica = FakeReplica({step_s})
    server = Server(replica, replica, Listen(port=0, admin_port=0, drain_s=20.0), SystemClock())

    def announce(public, admin):
        banner.show("serac 1 tiny", {{"grpc": public, "lanes": "b0 both on 1 device"}}, sys.stdout)

    return await process.run(server, announce)

sys.exit(asyncio.run(main()))
"""


@pytest.fixture
def buf(server):
    """Runs `buf curl`; returns its exit code and the JSON objects it printed."""
    path = shutil.which("buf") or shutil.which("buf", path=str(Path(sys.executable).parent))
    if path is None:
        pytest.skip("needs buf: pip install buf-bin")

    def curl(*arguments: str) -> tuple[int, str, str]:
        command = [path, "curl", "--protocol", "grpc", "--http2-prior-knowledge", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
        return done.returncode, done.stdout, done.stderr

    return lambda method, *arguments: curl(*arguments, f"http://{server[1][0]}{method}")


def objects(text: str) -> list[dict]:
    decoder, found = json.JSONDecoder(), []
    while text := text.lstrip():
        value, end = decoder.raw_decode(text)
        found.append(value)
        text = text[end:]
    return found


def test_a_foreign_client_finds_the_services_by_reflection(buf):
    code, out, _ = buf("", "--list-methods")
    rpcs = {line.rpartition("/")[2] for line in out.split() if line.startswith("serac.v1.InferenceService/")}
    assert code == 0
    assert rpcs == {"Abort", "Detokenize", "Generate", "GenerateUnary", "ListModels", "Tokenize"}


def test_a_foreign_client_generates_and_streams(buf):
    question = {"text": "ab", "stopping": {"max_tokens": 3}, "sampling": {"seed": 7}}
    code, out, _ = buf("/serac.v1.InferenceService/Generate", "-d", json.dumps(question))
    parts = objects(out)
    assert code == 0 and "".join(part["choices"][0]["text"] for part in parts) == "abc"
    assert {part["seed"] for part in parts} == {"7"}
    assert parts[-1]["choices"][0]["finish"]["reason"] == "FINISH_REASON_LENGTH"
    code, out, _ = buf("/serac.v1.InferenceService/GenerateUnary", "-d", json.dumps(question))
    assert code == 0 and objects(out)[0]["choices"][0]["text"] == "abc"


def test_a_foreign_client_gets_the_code_and_the_words_of_a_refusal(buf):
    bad = json.dumps({"text": "ab", "sampling": {"temperature": -1}})
    code, _, err = buf("/serac.v1.InferenceService/GenerateUnary", "-d", bad)
    answer = json.loads(err)
    assert code != 0 and answer["code"] == "invalid_argument"
    assert answer["message"] == "temperature: got -1.0; expected a finite number in 0..100"
    assert [detail["type"] for detail in answer["details"]] == ["google.rpc.ErrorInfo", "google.rpc.BadRequest"]


def command(step_s: float) -> list[str]:
    """A server of the replica without a model."""
    program = SERVE.format(paths=[str(Path(__file__).parent), str(ROOT)], step_s=step_s)
    return [sys.executable, "-c", program, "serve", "tiny"]


@pytest.fixture
def child():
    """Starts a server process; yields a function that returns it and its address."""
    started = []

    def start(step_s: float) -> tuple[subprocess.Popen, str]:
        process = subprocess.Popen(command(step_s), stdout=subprocess.PIPE, text=True)
        started.append(process)
        return process, json.loads(process.stdout.readline())["grpc"]

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def test_sigterm_refuses_new_calls_lets_open_ones_end_and_leaves_with_0(child):
    process, address = child(0.05)
    with Client(address) as client, Client(address) as other:
        parts = client.stream("ab", max_tokens=30)
        text = next(parts).text
        process.send_signal(signal.SIGTERM)
        with pytest.raises(Unavailable):
            for _ in range(200):
                other.generate("ab", max_tokens=1)
        text += "".join(part.text for part in parts)
        assert text == "abcdefghijklmnopqrstuvwxyzabcd"
    assert process.wait(timeout=20) == 0


def test_a_second_sigterm_leaves_at_once_with_1(child):
    process, address = child(0.05)
    with Client(address) as client:
        next(client.stream("ab", max_tokens=200))
        parts = client.stream("ab", max_tokens=200)
        next(parts)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=5) == 1


def test_the_demo_asks_three_ways_and_leaves_no_server_behind(monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    out = io.StringIO()
    assert demo.run(out, command(0.0)) == 0
    said = out.getvalue()
    assert "Starting: serac serve tiny" in said
    assert "Ready: serac 1 tiny, lanes b0 both on 1 device, gRPC on 127.0.0.1:" in said
    assert demo.STREAMED + "abcdefgh" in said and "[length, 64 tokens, revision r1]" in said
    assert all(prompt + "abcdefgh" in said for prompt in demo.SIDE_BY_SIDE)
    assert f"user: {demo.QUESTION}\nassistant: abcdefgh" in said
    assert said.index("The server drained and left.") < said.index("serac serve MODEL")


def test_a_server_that_ends_before_it_is_ready_ends_the_demo(monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(Unavailable, match="ended with code 3 before it was ready"):
        demo.run(io.StringIO(), [sys.executable, "-c", "import sys; print('loading'); sys.exit(3)"])


@pytest.mark.slow
def test_the_demo_serves_the_embedded_model_on_eight_devices():
    """Takes a minute on two quiet cores: it compiles a dozen programs."""
    flags = {"XLA_FLAGS", "JAX_PLATFORMS"}
    environment = {name: value for name, value in os.environ.items() if name not in flags}
    run = [sys.executable, "-m", "engine.cli", "demo"]
    done = subprocess.run(run, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "lanes b0 both on 8 devices" in done.stdout and "The server drained and left." in done.stdout
