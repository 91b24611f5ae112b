"""The blocking client, and what both clients do before a connection is asked."""

import asyncio
import threading

import pytest

from engine.errors import ConfigError, InvalidArgument, NotFound, SeracError, Unavailable
from engine.serve.calls import write_generate
from engine.serve.client import AsyncClient, Client
from engine.serve.proto.serac.v1 import inference_pb2 as pb


def test_the_blocking_client_calls_everything(server):
    replica, (public, admin) = server
    with Client(public, admin=admin) as client:
        assert client.generate("ab", max_tokens=3).text == "abc"
        assert "".join(part.text for part in client.stream("ab", max_tokens=3)) == "abc"
        assert client.chat([{"role": "user", "content": "x"}], max_tokens=2).text == "ab"
        assert client.tokenize("ab") == [2, 97, 98] and client.detokenize([97]) == "a"
        assert client.models()[0].name == "tiny" and client.abort("none") is False
        assert client.info().model == "tiny" and client.load()["blocks_free"] == 255
        with pytest.raises(NotFound, match="available: tiny"):
            list(client.stream("ab", model="large"))


def test_leaving_a_blocking_stream_cancels_it(server):
    replica, (public, _) = server
    with Client(public) as client:
        for _part in client.stream("ab", max_tokens=200, request_id="left"):
            break
        stream = replica.streams[-1]
        for _ in range(200):
            if stream.closed:
                break
            threading.Event().wait(0.01)
        assert stream.closed


def test_an_admin_call_without_an_admin_address_says_so(server):
    with Client(server[1][0]) as client, pytest.raises(ConfigError, match="admin"):
        client.load()


def test_a_server_that_is_not_there_is_unavailable():
    async def scene():
        async with AsyncClient("127.0.0.1:1") as client:
            with pytest.raises(Unavailable):
                await client.generate("ab")

    asyncio.run(scene())
    with Client("127.0.0.1:1") as client, pytest.raises(Unavailable):
        client.generate("ab")


def test_a_foreign_server_that_knows_no_such_rpc_is_a_plain_error(server):
    with Client(server[1][1]) as client, pytest.raises(SeracError, match="UNIMPLEMENTED"):
        client.models()


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"temprature": 1.0}, "temprature: unknown parameter; did you mean temperature?"),
        ({"best_of": 2}, "best_of: unknown parameter"),
        ({"max_tokens": "5"}, "max_tokens: got '5'; expected an integer"),
        ({"max_tokens": 5.5}, "max_tokens: got 5.5"),
        ({"max_tokens": 2**64}, "max_tokens: got 18446744073709551616"),
        ({"seed": 2**64}, "seed"),
        ({"stop": [1]}, "stop"),
        ({"logit_bias": [1]}, "logit_bias"),
    ],
)
def test_a_parameter_that_the_wire_cannot_carry_is_refused_before_it_is_sent(parameters, words):
    with pytest.raises(InvalidArgument, match=words):
        write_generate(pb.GenerateRequest, "ab", parameters)


def test_one_stop_may_be_given_bare():
    message = write_generate(pb.GenerateRequest, "ab", {"stop": "END", "stop_token_ids": 7, "seed": None})
    assert list(message.stopping.stop) == ["END"] and list(message.stopping.stop_token_ids) == [7]
    assert not message.HasField("sampling")
