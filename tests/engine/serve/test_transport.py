"""What the connection itself must bear: clients that leave, many and quiet streams, foreign protocols, health."""

import asyncio
from contextlib import suppress

import grpc
import pytest
from fake_replica import Delta, FakeReplica, done, serving, until
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from engine.errors import Unavailable
from engine.serve.calls import OPTIONS
from engine.serve.client import AsyncClient
from engine.serve.proto.serac.v1 import inference_pb2 as pb

GENERATE = "/serac.v1.InferenceService/Generate"
UNARY = "/serac.v1.InferenceService/GenerateUnary"


@pytest.mark.parametrize("unary", [False, True])
def test_a_client_that_cancels_frees_its_stream_at_once(unary):
    async def scene():
        replica = FakeReplica()
        async with serving(replica) as client:
            if unary:
                call = asyncio.ensure_future(client.generate("ab"))
            else:
                call = asyncio.ensure_future(anext(client.stream("ab")))
            await until(lambda: replica.streams)
            call.cancel()
            started = asyncio.get_running_loop().time()
            await until(lambda: replica.streams[0].closed)
            assert asyncio.get_running_loop().time() - started < 0.1
            await until(lambda: client.server.gate.open_calls == 0)
            assert not replica.running

    asyncio.run(scene())


def test_a_client_that_leaves_between_tokens_frees_its_stream():
    async def scene():
        replica = FakeReplica(0.001)
        async with serving(replica) as client:
            for _ in range(20):
                stream = client.stream("ab", max_tokens=200)
                await anext(stream)
                await stream.aclose()
            await until(lambda: not replica.running and client.server.gate.open_calls == 0)
            assert len(replica.streams) == 20 and all(stream.closed for stream in replica.streams)

    asyncio.run(scene())


async def breakable(target: str) -> tuple[asyncio.Server, list[asyncio.StreamWriter]]:
    """A relay to `target`; aborting its writers breaks every connection through it."""
    host, port = target.split(":")
    writers: list[asyncio.StreamWriter] = []

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while data := await reader.read(65536):
                writer.write(data)

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection(host, int(port))
        writers.extend((writer, far_writer))
        await asyncio.gather(copy(reader, far_writer), copy(far_reader, writer))

    return await asyncio.start_server(relay, "127.0.0.1", 0), writers


def test_a_connection_that_breaks_frees_its_streams():
    async def scene():
        replica = FakeReplica()
        async with serving(replica) as client:
            relay, writers = await breakable(client.addresses[0])
            host, port = relay.sockets[0].getsockname()
            async with relay, AsyncClient(f"{host}:{port}") as far:
                calls = [asyncio.ensure_future(far.generate("ab")) for _ in range(5)]
                await until(lambda: len(replica.streams) == 5)
                for writer in writers:
                    writer.transport.abort()
                await until(lambda: not replica.running and client.server.gate.open_calls == 0)
                errors = await asyncio.gather(*calls, return_exceptions=True)
                assert [type(error) for error in errors] == [Unavailable] * 5

    asyncio.run(scene())


def test_a_call_that_ends_before_its_message_harms_nobody():
    async def scene():
        async with serving(FakeReplica(0.0)) as client:
            async with grpc.aio.insecure_channel(client.addresses[0]) as channel:
                call = channel.stream_unary(UNARY)()
                await call.done_writing()
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await asyncio.wait_for(call, 5)
                assert caught.value.code() in (grpc.StatusCode.CANCELLED, grpc.StatusCode.INVALID_ARGUMENT)
            await client.generate("ab", max_tokens=1)

    asyncio.run(scene())


def test_another_protocol_on_the_port_harms_nobody():
    async def scene():
        async with serving(FakeReplica(0.0)) as client:
            host, port = client.addresses[0].split(":")
            http, tls, noise = (
                b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
                b"\x16\x03\x01" + bytes(200),
                bytes(range(256)) * 40,
            )
            for opening in (http, tls, noise):
                reader, writer = await asyncio.open_connection(host, int(port))
                writer.write(opening)
                with suppress(ConnectionError):
                    await asyncio.wait_for(reader.read(), 5)
                writer.close()
            await client.generate("ab", max_tokens=1)

    asyncio.run(scene())


def test_a_client_that_reads_nothing_is_held_back_and_then_loses_its_stream():
    async def scene():
        replica = FakeReplica()
        async with (
            serving(replica, stall_s=0.3) as client,
            grpc.aio.insecure_channel(client.addresses[0]) as channel,
        ):
            call = channel.unary_stream(GENERATE)(pb.GenerateRequest(text="ab").SerializeToString())
            await until(lambda: replica.streams)
            stream, sent = replica.streams[0], 0
            while not stream.closed and sent < 3000:
                stream.push(Delta(0, "x" * 10_000, [97]))
                sent += 1
                await asyncio.sleep(0.0005)
            assert stream.closed and stream.wakes < sent
            await until(lambda: client.server.gate.open_calls == 0)
            call.cancel()

    asyncio.run(scene())


def test_a_hundred_streams_run_side_by_side():
    async def scene():
        replica = FakeReplica(0.001)
        async with serving(replica) as client:

            async def one(k: int) -> tuple[str, int]:
                parts = [part async for part in client.stream([5 + k % 100], max_tokens=30, seed=k)]
                return "".join(part.text for part in parts), parts[0].seed

            replies = await asyncio.gather(*(one(k) for k in range(100)))
            assert max(len(replica.opened), 100) == 100
        alphabet = "abcdefghijklmnopqrstuvwxyzabcd"
        assert replies == [(alphabet, k) for k in range(100)]

    asyncio.run(scene())


async def survive_quiet(quiet_s: float, ping_s: float) -> None:
    """A stream that says nothing for `quiet_s` while its client pings each `ping_s` still ends well."""
    replica = FakeReplica()
    options = [pair for pair in OPTIONS if pair[0] != "grpc.keepalive_time_ms"]
    options += [("grpc.keepalive_time_ms", round(ping_s * 1000)), ("grpc.keepalive_timeout_ms", 1000)]
    async with (
        serving(replica) as client,
        grpc.aio.insecure_channel(client.addresses[0], options=options) as channel,
    ):
        call = channel.unary_stream(GENERATE, response_deserializer=pb.GenerateResponse.FromString)(
            pb.GenerateRequest(text="ab").SerializeToString()
        )
        await until(lambda: replica.streams)
        await asyncio.sleep(quiet_s)
        stream = replica.streams[0]
        assert not stream.closed
        stream.push(Delta(0, "a", [97], finish=done(stream.request, 1)))
        assert [part.choices[0].text async for part in call] == ["a"]
        assert await call.code() is grpc.StatusCode.OK


def test_a_quiet_stream_survives_pings():
    asyncio.run(survive_quiet(4.5, 0.5))  # with the stock options the third ping ends it, after 3.5 s


@pytest.mark.slow
def test_a_stream_quiet_for_a_minute_survives_a_ping_each_ten_seconds():
    """Takes 61 s."""
    asyncio.run(survive_quiet(61.0, 10.0))


async def health_of(client, service: str = "", admin: bool = False) -> int:
    async with grpc.aio.insecure_channel(client.addresses[int(admin)]) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        return (await stub.Check(health_pb2.HealthCheckRequest(service=service))).status


def test_health_follows_the_replica_and_the_drain():
    serving_now, not_serving = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING

    async def scene():
        replica = FakeReplica(0.0)
        async with serving(replica) as client:
            for service in ("", "serac.v1.InferenceService"):
                assert await health_of(client, service) == serving_now
            replica.ready = False
            with pytest.raises(Unavailable, match="not ready"):
                await client.generate("ab")
            for _ in range(100):
                if await health_of(client) == not_serving:
                    break
                await asyncio.sleep(0.02)
            assert await health_of(client, admin=True) == not_serving

    asyncio.run(scene())


def test_each_listener_lists_its_services_by_reflection():
    async def scene():
        async with serving(FakeReplica()) as client:
            listed = []
            for address in client.addresses:
                async with grpc.aio.insecure_channel(address) as channel:
                    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
                    call = stub.ServerReflectionInfo()
                    await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
                    answer = await call.read()
                    listed.append({service.name for service in answer.list_services_response.service})
                    await call.done_writing()
            return listed

    public, admin = asyncio.run(scene())
    shared = {"grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}
    assert public == shared | {"serac.v1.InferenceService"}
    assert admin == shared | {"serac.v1.ControlService"}
