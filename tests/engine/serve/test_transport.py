"""What the connection itself must bear: bad bytes, clients that leave, many streams, quiet streams, health."""

import asyncio
import logging
from contextlib import suppress

import grpc
import pytest
from fake_replica import Delta, FakeReplica, done, serving, until
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status

from engine.errors import InvalidArgument, OutOfBlocks, ResourceExhausted, SeracError, Unavailable
from engine.serve.calls import OPTIONS
from engine.serve.client import AsyncClient
from engine.serve.proto.serac.v1 import inference_pb2 as pb

GENERATE = "/serac.v1.InferenceService/Generate"
UNARY = "/serac.v1.InferenceService/GenerateUnary"


async def raw_call(client, method: str, data: bytes, **options) -> grpc.aio.AioRpcError:
    """The error that bytes sent as they are get."""
    async with grpc.aio.insecure_channel(client.addresses[0]) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary(method)(data, timeout=10, **options)
    return caught.value


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (pb.GenerateUnaryRequest(text="abc").SerializeToString()[:-1], "malformed"),
        (b"\xff" * 40, "malformed"),
        (b"\x1a\x02\xff\xfe", "text: got bytes that are not UTF-8"),
        (b"\x3a\x04\x1a\x02\xc3\x28", "stopping.stop: got bytes that are not UTF-8"),
        (b"\x2a\x06\x0a\x04\x12\x02\xc3\x28", "chat.messages.content: got bytes that are not UTF-8"),
        (b"\x78\x01", "malformed: unknown field 15"),
        (b"\x32\x02\x78\x01", "malformed: unknown field sampling.15"),
        (b"\x08\x01", "malformed"),  # request_id as a number: another type's message
        (b"", "prompt: got none; expected exactly one of text, token_ids, chat"),
    ],
)
def test_bytes_that_are_no_request_are_refused_with_a_reason(data, words):
    async def scene():
        replica = FakeReplica(0.0)
        async with serving(replica) as client:
            error = await raw_call(client, UNARY, data)
            assert error.code() is grpc.StatusCode.INVALID_ARGUMENT and words in error.details(), error.details()
            assert "google" not in error.details() and not replica.opened
            await client.generate("ab", max_tokens=1)

    asyncio.run(scene())


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"prompt": ""}, "prompt: .*empty"),
        ({"prompt": []}, "prompt: .*empty"),
        ({"prompt": [5, 128]}, r"prompt_ids\[1\]: got 128; expected .*0..V-1"),
        ({"prompt": [2**31]}, r"prompt_ids\[0\]: got 2147483648"),
        ({"prompt": [2**63 - 1]}, r"prompt_ids\[0\]"),
        ({"prompt": [-1]}, r"prompt_ids\[0\]: got -1"),
        ({"prompt": "a" * 300}, "prompt: got .301 tokens.; .*context length 256"),
        ({"prompt": "a" * 4000}, "prompt: .*context length 256"),
        ({"prompt": "a" * 3_000_000}, "prompt: .*more than .* tokens.; .*context length 256"),
        ({"max_tokens": 254}, "max_tokens: got 254; expected .* 1..253"),
        ({"max_tokens": 0}, "max_tokens: .*>= 1"),
        ({"max_tokens": -1}, "max_tokens: got -1"),
        ({"max_tokens": 2**31}, "max_tokens: got 2147483648"),
        ({"temperature": float("nan")}, "temperature: .*finite"),
        ({"temperature": -0.1}, "temperature: .*0..100"),
        ({"temperature": 1e30}, "temperature: .*0..100"),
        ({"top_p": 0.0}, r"top_p: .*\(0, 1\]"),
        ({"top_p": float("inf")}, "top_p"),
        ({"top_k": -2}, "top_k: got -2"),
        ({"min_p": 1.0001}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty: .*> 0"),
        ({"presence_penalty": 1e9}, "presence_penalty: .*-2..2"),
        ({"n": 0}, "n: got 0; .*1..128"),
        ({"n": 129}, "n: got 129; .*1..128"),
        ({"logprobs": 10000}, "logprobs: .*0..20"),
        ({"logit_bias": {k: 1.0 for k in range(1025)}}, "logit_bias: .*<= 1024"),
        ({"logit_bias": {k: -100.0 for k in range(128)}}, "no token left"),
        ({"stop": ["x"] * 10_000}, "stop: .*<= 16"),
        ({"stop": ["x", ""]}, r"stop\[1\]: .*empty"),
        ({"stop_token_ids": [1, 128]}, r"stop_token_ids\[1\]"),
        ({"seed": -1}, "seed: got -1"),
        ({"min_tokens": 9, "max_tokens": 5}, "min_tokens: got 9; .*max_tokens"),
        ({"request_id": "x" * 129}, "request_id"),
        ({"request_id": "a\nb"}, "request_id"),
        ({"cache_salt": b"x" * 129}, "cache_salt"),
    ],
)
def test_a_field_outside_its_domain_is_refused_by_name(parameters, words):
    async def scene():
        replica = FakeReplica(0.0)
        async with serving(replica) as client:
            with pytest.raises(InvalidArgument, match=words) as caught:
                await client.generate(**({"prompt": "ab"} | parameters))
            error = caught.value
            assert type(error) is InvalidArgument and error.field and error.retry_after_s is None
            assert not replica.running and client.server.gate.open_calls == 0

    asyncio.run(scene())


def test_control_bytes_and_special_words_in_a_prompt_are_text():
    async def scene():
        replica = FakeReplica(0.0)
        async with serving(replica) as client:
            await client.generate("\x00\x1b<|eot|>", max_tokens=1, add_special_tokens=False)
        assert replica.opened[0].prompt_ids == tuple(map(ord, "\x00\x1b<|eot|>"))

    asyncio.run(scene())


def test_a_message_over_the_limit_and_an_unknown_method_have_their_own_codes():
    async def scene():
        async with serving(FakeReplica(0.0), max_message_bytes=1000) as client:
            with pytest.raises(ResourceExhausted, match="max"):
                await client.generate("a" * 2000)
            error = await raw_call(client, "/serac.v1.InferenceService/Guess", b"")
            assert error.code() is grpc.StatusCode.UNIMPLEMENTED
            error = await raw_call(client, UNARY, b"", metadata=(("x-large", "v" * 30_000),))
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED and "metadata" in error.details()

    asyncio.run(scene())


def test_a_bug_is_internal_with_an_id_that_the_log_knows(caplog):
    async def scene():
        replica = FakeReplica()
        replica.refusal = ValueError("the secret prompt")
        async with serving(replica) as client:
            with pytest.raises(SeracError, match="internal error; error id [0-9a-f]{16}$") as caught:
                await client.generate("ab", request_id="mine")
            error = await raw_call(client, UNARY, pb.GenerateUnaryRequest(text="ab").SerializeToString())
            assert error.code() is grpc.StatusCode.INTERNAL
        return str(caught.value)

    with caplog.at_level(logging.DEBUG):
        message = asyncio.run(scene())
    mine = [record.getMessage() for record in caplog.records if "request_id=mine" in record.getMessage()]
    assert len(mine) == 1 and message.split()[-1] in mine[0] and "ValueError" in mine[0]
    assert "secret" not in caplog.text and "Traceback" not in caplog.text


def test_a_refusal_to_be_retried_says_when_in_rich_details():
    async def scene():
        replica = FakeReplica()
        replica.refusal = OutOfBlocks("kv: the pool is full", retry_after_s=2.5)
        async with serving(replica) as client:
            with pytest.raises(OutOfBlocks, match="pool is full") as caught:
                await client.generate("ab")
            assert caught.value.retry_after_s == 2.5
            error = await raw_call(client, UNARY, pb.GenerateUnaryRequest(text="ab").SerializeToString())
            status = rpc_status.from_call(error)
            assert [detail.type_url.split(".")[-1] for detail in status.details] == ["ErrorInfo", "RetryInfo"]

    asyncio.run(scene())


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
    asyncio.run(survive_quiet(1.0, 0.1))


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
