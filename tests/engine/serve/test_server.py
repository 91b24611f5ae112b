"""Listeners, access, drain and the operator's RPCs."""

import asyncio
import os
import socket
import subprocess
from pathlib import Path

import grpc
import pytest
from fake_replica import Delta, FakeReplica, done, serving, until
from grpc_health.v1 import health_pb2, health_pb2_grpc

from engine.clock import SystemClock
from engine.errors import ConfigError, InvalidArgument, SeracError, Unavailable
from engine.serve.access import Access
from engine.serve.client import AsyncClient
from engine.serve.process import Signals
from engine.serve.server import Listen, Server


def test_every_listener_stands_on_loopback_by_default():
    async def scene():
        async with serving(FakeReplica()) as client:
            ports = {int(address.rpartition(":")[2]) for address in client.addresses}
            tables = [Path("/proc/net", name).read_text().splitlines() for name in ("tcp", "tcp6")]
            lines = [line.split() for table in tables for line in table]
            listening = [line[1] for line in lines if line[3] == "0A"]
            mine = [place for place in listening if int(place.rpartition(":")[2], 16) in ports]
            assert len(mine) == 2 and all(place.rpartition(":")[0].endswith("0100007F") for place in mine)

    asyncio.run(scene())


@pytest.mark.parametrize("field", ["host", "admin_host"])
def test_an_address_beyond_this_machine_needs_a_guard_or_the_flag_that_waives_it(field, tmp_path):
    ports = {"port": 0, "admin_port": 0}
    with pytest.raises(ConfigError, match=f"{field}: got '0.0.0.0'; .*--insecure-allow-remote") as caught:
        Listen(**{field: "0.0.0.0"}, **ports).check()
    assert caught.value.exit_code == 2
    Listen(**{field: "0.0.0.0"}, **ports, access=Access(insecure_allow_remote=True)).check()
    Listen(**{field: "0.0.0.0"}, **ports, access=Access(token_file=tmp_path / "tokens")).check()


def test_a_taken_port_is_refused_by_number():
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port: got {port}; expected a free port .*ss -ltnp"):
            Listen(port=port, admin_port=0).check()
        with pytest.raises(ConfigError, match=f"admin_port: got {port}"):
            Listen(port=0, admin_port=port).check()


def test_two_servers_cannot_share_a_port():
    async def scene():
        async with serving(FakeReplica()) as client:
            port = int(client.addresses[0].rpartition(":")[2])
            second = Server(FakeReplica(), FakeReplica(), Listen(port=port, admin_port=0), SystemClock())
            with pytest.raises(ConfigError, match=f"port: got {port}"):
                await second.start()

    asyncio.run(scene())


def test_a_token_opens_every_door_but_health_which_is_open(tmp_path):
    path = tmp_path / "tokens"
    path.write_text("first-token\nsecond-token\n")

    async def scene():
        replica = FakeReplica(0.0)
        async with serving(replica, access=Access(token_file=path)) as client:
            public, admin = client.addresses
            for token in (None, "wrong", "first-token\nsecond-token", ""):
                async with AsyncClient(public, admin=admin, token=token and token.replace("\n", " ")) as stranger:
                    for call in (stranger.models, stranger.load, lambda c=stranger: c.generate("ab")):
                        with pytest.raises(SeracError, match="UNAUTHENTICATED"):
                            await call()
                    with pytest.raises(SeracError, match="UNAUTHENTICATED"):
                        await anext(stranger.stream("ab"))
            async with AsyncClient(public, admin=admin, token="second-token") as friend:
                await friend.generate("ab", max_tokens=1)
                assert (await friend.load())["open_requests"] == 0
            async with grpc.aio.insecure_channel(public) as channel:
                check = health_pb2_grpc.HealthStub(channel).Check
                assert (await check(health_pb2.HealthCheckRequest())).status == 1
        assert len(replica.opened) == 1

    asyncio.run(scene())


def test_a_token_file_without_a_token_is_refused(tmp_path):
    for content in (None, "\n \n"):
        path = tmp_path / "tokens"
        if content is not None:
            path.write_text(content)
        with pytest.raises(ConfigError, match="token_file"):
            Server(FakeReplica(), FakeReplica(), Listen(access=Access(token_file=path)), SystemClock())


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tls")
    cert, key = folder / "cert.pem", folder / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(cert)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("needs the openssl command to make a certificate")
    key.chmod(0o600)
    return cert, key


def test_a_client_speaks_tls_with_the_root_it_is_given(certificate):
    cert, key = certificate

    async def scene():
        replica = FakeReplica(0.0)
        async with serving(replica, access=Access(tls_cert=cert, tls_key=key)) as plain:
            with pytest.raises(Unavailable):
                await plain.generate("ab", timeout_s=5)
            async with AsyncClient(plain.addresses[0], tls_ca=cert.read_bytes()) as client:
                assert (await client.generate("ab", max_tokens=2)).text == "ab"

    asyncio.run(scene())


def test_a_certificate_needs_its_key_and_a_key_its_secrecy(certificate, tmp_path):
    cert, key = certificate
    free = {"port": 0, "admin_port": 0}
    with pytest.raises(ConfigError, match="expected both"):
        Listen(access=Access(tls_cert=cert), **free).check()
    with pytest.raises(ConfigError, match="tls_cert: .*readable file"):
        Listen(access=Access(tls_cert=tmp_path / "none", tls_key=key), **free).check()
    loose = tmp_path / "key.pem"
    loose.write_bytes(key.read_bytes())
    loose.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod"):
        Listen(access=Access(tls_cert=cert, tls_key=loose), **free).check()


def test_a_key_of_another_certificate_and_a_certificate_of_another_day_are_refused(certificate, tmp_path):
    cert, key = certificate
    free = {"port": 0, "admin_port": 0}
    other = tmp_path / "other.pem"
    subprocess.run(["openssl", "genrsa", "-out", str(other), "2048"], check=True, capture_output=True)
    other.chmod(0o600)
    with pytest.raises(ConfigError, match="tls_cert: .*its own private key"):
        Listen(access=Access(tls_cert=cert, tls_key=other), **free).check()
    old, ask = tmp_path / "old.pem", tmp_path / "ask.csr"
    asking = ["openssl", "req", "-new", "-key", str(key), "-subj", "/CN=localhost", "-out", str(ask)]
    signing = ["openssl", "x509", "-req", "-in", str(ask), "-signkey", str(key), "-days", "-1", "-out", str(old)]
    for command in (asking, signing):
        subprocess.run(command, check=True, capture_output=True)
    with pytest.raises(ConfigError, match="tls_cert: .*certificate has expired"):
        Listen(access=Access(tls_cert=old, tls_key=key), **free).check()


def test_a_drain_lets_open_streams_finish_and_refuses_new_ones():
    async def scene():
        replica = FakeReplica()
        async with serving(replica) as client:
            open_call = asyncio.ensure_future(client.generate("ab"))
            await until(lambda: replica.streams)
            drain = asyncio.ensure_future(client.drain(30))
            await until(lambda: client.server.gate.draining)
            with pytest.raises(Unavailable, match="draining") as caught:
                await client.generate("ab")
            assert caught.value.retry_after_s == 1.0
            assert (await client.info()).draining and not (await client.info()).ready
            stream = replica.streams[0]
            stream.push(Delta(0, "a", [97], finish=done(stream.request, 1)))
            assert (await open_call).text == "a"
            assert await drain == 0
            assert 0 < replica.drained_with <= 30 and client.server.drained.is_set()

    asyncio.run(scene())


def test_a_drain_that_runs_out_of_time_cuts_off_what_is_left():
    async def scene():
        replica = FakeReplica()
        async with serving(replica) as client:
            calls = [asyncio.ensure_future(client.generate("ab")) for _ in range(3)]
            await until(lambda: len(replica.streams) == 3)
            assert await client.drain(0.1) == 3
            assert all(stream.closed for stream in replica.streams) and replica.drained_with == 0
            for error in await asyncio.gather(*calls, return_exceptions=True):
                assert isinstance(error, SeracError)

    asyncio.run(scene())


@pytest.mark.parametrize("timeout_s", [-1.0, float("nan"), float("inf")])
def test_a_drain_time_is_finite_and_not_negative(timeout_s):
    async def scene():
        async with serving(FakeReplica()) as client:
            with pytest.raises(InvalidArgument, match="timeout_s"):
                await client.drain(timeout_s)
            assert not client.server.gate.draining

    asyncio.run(scene())


def test_the_first_signal_drains_and_the_second_leaves_at_once():
    async def scene():
        replica, codes = FakeReplica(), []
        async with serving(replica) as client:
            call = asyncio.ensure_future(client.generate("ab"))
            await until(lambda: replica.streams)
            signals = Signals(client.server, leave=codes.append)
            signals.receive(15)
            await until(lambda: client.server.gate.draining)
            assert codes == [] and not client.server.drained.is_set()
            signals.receive(15)
            assert codes == [1]
            replica.abort(replica.opened[0].request_id)
            await call
            await client.server.drained.wait()

    asyncio.run(scene())


def test_the_operator_sees_what_runs_and_how_much():
    async def scene():
        replica = FakeReplica()
        async with serving(replica) as client:
            call = asyncio.ensure_future(client.generate("ab"))
            await until(lambda: replica.streams)
            load, info = await client.load(), await client.info()
            call.cancel()
        assert load == {"open_requests": 1, "running": 1, "blocks_free": 255}
        assert (info.version, info.model, info.revision, info.ready) == ("1", "tiny", "r1", True)
        assert (info.context_length, info.vocab_size) == (256, 128) and info.uptime_s > 0

    asyncio.run(scene())


def test_a_thousand_calls_leave_no_open_files_behind():
    async def scene():
        replica = FakeReplica(0.0)
        async with serving(replica) as client:
            await client.generate("ab", max_tokens=1)
            before = len(os.listdir("/proc/self/fd"))
            for _ in range(10):
                await asyncio.gather(*(client.generate("ab", max_tokens=1) for _ in range(100)))
            assert len(os.listdir("/proc/self/fd")) <= before + 1
            assert client.server.gate.open_calls == 0 and not replica.running

    asyncio.run(scene())
