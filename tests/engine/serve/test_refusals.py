"""What is refused, with which code and words: bytes that are no request, fields outside their domains, bugs."""

import asyncio
import logging

import grpc
import pytest
from fake_replica import FakeReplica, serving
from grpc_status import rpc_status

from engine.errors import InvalidArgument, OutOfBlocks, ResourceExhausted, SeracError
from engine.serve.proto.serac.v1 import inference_pb2 as pb

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
