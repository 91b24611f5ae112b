"""Envoy as the plain balancer, by the configuration that the page shows, with other ports."""

import time
from pathlib import Path

import pytest

import engine.serve
from engine.errors import SeracError
from engine.serve.client import Client
from tests.gateway.scene import Process, free_port

CONFIGURATION = Path(engine.serve.__file__).with_name("envoy.yaml")


def configuration(folder: Path, port: int, replicas) -> Path:
    """The page's, for these ports."""
    text = CONFIGURATION.read_text().replace("50050", str(port))
    for written, replica in zip(("50051", "50061"), replicas, strict=True):
        assert text.count(f"port_value: {written}") == 1
        text = text.replace(f"port_value: {written}", f"port_value: {replica.address.rpartition(':')[2]}")
    (folder / "envoy.yaml").write_text(text)
    return folder / "envoy.yaml"


@pytest.mark.slow
def test_calls_go_to_both_replicas_and_after_a_death_all_to_the_other(programs, make_replicas, tmp_path):
    """Real processes and a real Envoy. Costs a minute; the first time up to five, for programs to compile."""
    replicas, port = make_replicas((), ()), free_port()
    file = configuration(tmp_path, port, replicas)
    command = [str(programs / "envoy"), "-c", str(file), "--base-id", str(port)]
    envoy = Process(command, tmp_path / "envoy.log", None)
    try:
        with Client(f"127.0.0.1:{port}") as client:
            until = time.monotonic() + 30.0
            while True:  # until its first health checks are answered
                try:
                    first = client.generate("def f(x):\n", max_tokens=8, temperature=0.0).text
                    break
                except SeracError:
                    assert time.monotonic() < until, envoy.log.read_text()[-2000:]
                    time.sleep(0.1)
            texts = {client.generate("def f(x):\n", max_tokens=8, temperature=0.0).text for _ in range(20)}
            assert texts == {first} and min(replica.served() for replica in replicas) > 1
            replicas[1].kill()
            for _ in range(20):  # a call that finds nobody there is tried again elsewhere
                assert client.generate("def f(x):\n", max_tokens=8, temperature=0.0).text == first
    finally:
        envoy.kill()
