"""What a client gets from InferenceService, over real connections to a replica without a model."""

import asyncio
from dataclasses import fields

import pytest
from fake_replica import Delta, FakeReplica, Info, TokenLogprob, done, serving, until

from engine.core.request import Request, Sampling, Stopping
from engine.errors import AlreadyExists, DeadlineExceeded, InvalidArgument, NotFound, NumericError
from engine.serve.calls import join
from engine.serve.proto.serac.v1 import inference_pb2 as pb


def test_a_stream_yields_text_tokens_and_one_finish_with_usage():
    async def scene():
        async with serving(FakeReplica(0.001)) as client:
            parts = [part async for part in client.stream("ab", max_tokens=4, seed=11)]
        whole = join(parts)
        assert [part.text for part in parts] == ["a", "b", "c", "d"]
        assert [part.choices[0].finish_reason for part in parts] == [None, None, None, "length"]
        assert whole.choices[0].token_ids == (97, 98, 99, 100)
        assert (whole.model, whole.revision, whole.seed) == ("tiny", "r1", 11)
        usage = whole.choices[0].usage
        assert (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens) == (3, 4, 0)

    asyncio.run(scene())


def test_a_unary_call_says_what_the_stream_says():
    async def scene():
        async with serving(FakeReplica(0.001)) as client:
            whole = await client.generate("ab", max_tokens=5, n=2, seed=1, request_id="same")
            parts = [part async for part in client.stream("ab", max_tokens=5, n=2, seed=1, request_id="same")]
        assert whole == join(parts)
        assert [choice.index for choice in whole.choices] == [0, 1]
        assert whole.text == "abcde"

    asyncio.run(scene())


def test_whatever_waits_becomes_one_message():
    async def scene():
        replica = FakeReplica()
        async with serving(replica) as client:
            call = client.stream("ab", max_tokens=9, n=2)
            first = asyncio.ensure_future(anext(call))
            await until(lambda: replica.streams)
            stream = replica.streams[0]
            stream.push(Delta(1, "x", [120]), Delta(0, "a", [97]), Delta(0, "bc", [98, 99]), Delta(1, "y", [121]))
            part = await first
            assert [(choice.index, choice.text, choice.token_ids) for choice in part.choices] == [
                (0, "abc", (97, 98, 99)),
                (1, "xy", (120, 121)),
            ]
            stream.push(
                Delta(0, finish=done(stream.request, 3)), Delta(1, finish=done(stream.request, 2, "stop", stop="y"))
            )
            rest = [part async for part in call]
            assert len(rest) == 1 and stream.wakes == 2
            assert [(choice.finish_reason, choice.stop) for choice in rest[0].choices] == [
                ("length", None),
                ("stop", "y"),
            ]

    asyncio.run(scene())


def test_deltas_that_say_nothing_cost_no_message():
    async def scene():
        replica = FakeReplica()
        async with serving(replica) as client:
            call = client.stream("ab", max_tokens=9)
            first = asyncio.ensure_future(anext(call))
            await until(lambda: replica.streams)
            stream = replica.streams[0]
            stream.push(Delta(0))
            await until(lambda: stream.wakes == 1)
            stream.push(Delta(0, "a", [97], finish=done(stream.request, 1, "stop", stop=97)))
            part = await first
            assert part.text == "a" and part.choices[0].stop == 97
            assert [part async for part in call] == []

    asyncio.run(scene())


def test_every_field_of_a_request_reaches_the_core():
    """Whoever adds a field to the core's request must carry it here."""
    sent = {
        "temperature": 0.5, "top_k": 3, "top_p": 0.25, "min_p": 0.125, "seed": 2**63 - 1, "repetition_penalty": 1.5,
        "frequency_penalty": -1.5, "presence_penalty": 1.25, "logprobs": 0, "prompt_logprobs": 2, "n": 3,
        "max_tokens": 7, "min_tokens": 2, "stop": ("x", "yz"), "stop_token_ids": (5, 6), "include_stop": True,
        "ignore_eos": True,
    }  # fmt: skip

    async def scene():
        replica = FakeReplica(0.0)
        async with serving(replica) as client:
            bias = {4: -1.5, 9: 100.0}
            others = {"request_id": "me", "cache_salt": b"\x00s", "skip_special_tokens": False}
            await client.generate([5, 6, 7], logit_bias=bias, timeout_s=60, **others, **sent)
        return replica.opened[0]

    request = asyncio.run(scene())
    assert request.sampling == Sampling(
        **{name: sent[name] for name in sent if name in Sampling.__slots__}, logit_bias=((4, -1.5), (9, 100.0))
    )
    assert request.stopping == Stopping(**{name: sent[name] for name in sent if name in Stopping.__slots__})
    assert (request.request_id, request.prompt_ids, request.salt) == ("me", (5, 6, 7), b"\x00s")
    assert request.skip_special_tokens is False
    untouched = {each.name for each in fields(Request) if getattr(request, each.name) == each.default}
    assert untouched == {"adapter"}  # named by a client, it is refused: no adapters yet
    assert not {each.name for each in fields(Sampling) if getattr(request.sampling, each.name) == each.default}
    assert not {each.name for each in fields(Stopping) if getattr(request.stopping, each.name) == each.default}


def test_what_is_not_set_takes_the_models_default_and_then_the_cores():
    async def scene():
        replica = FakeReplica(0.0, Info(defaults={"temperature": 0.75, "top_k": 40}))
        async with serving(replica) as client:
            await client.generate("ab", max_tokens=1)
            await client.generate("ab", max_tokens=1, temperature=0.0, top_k=0)
            unary = await client.generate("ab", max_tokens=1)
        first, second, third = replica.opened
        assert (first.sampling.temperature, first.sampling.top_k, first.sampling.top_p) == (0.75, 40, 1.0)
        assert (second.sampling.temperature, second.sampling.top_k) == (0.0, 0)
        assert first.sampling.logprobs is None and first.stopping.max_tokens == 1
        assert unary.seed == third.sampling.seed != first.sampling.seed
        assert first.skip_special_tokens is True and first.deadline_at is None

    asyncio.run(scene())


def test_a_prompt_is_text_tokens_or_a_chat():
    async def scene():
        replica = FakeReplica(0.0)
        async with serving(replica) as client:
            await client.generate("ab", max_tokens=1)
            await client.generate("ab", max_tokens=1, add_special_tokens=False)
            await client.generate([97], max_tokens=1)
            await client.chat([{"role": "user", "content": "x"}], max_tokens=1)
            chat = await client.tokenize([{"role": "user", "content": "x"}])
            plain = await client.tokenize("ab", add_special_tokens=False)
        prompts = [request.prompt_ids for request in replica.opened]
        assert prompts == [(2, 97, 98), (97, 98), (97,), tuple(map(ord, "<user>x>"))]
        assert chat == list(map(ord, "<user>x>")) and plain == [97, 98]

    asyncio.run(scene())


def test_log_probabilities_of_output_and_prompt_come_back():
    async def scene():
        replica = FakeReplica()
        async with serving(replica) as client:
            call = asyncio.ensure_future(client.generate([97, 98], max_tokens=1, logprobs=2, prompt_logprobs=0))
            await until(lambda: replica.streams)
            stream = replica.streams[0]
            scored = TokenLogprob(99, -0.5, 2, [(98, -0.25), (99, -0.5)])
            prompt = [None, TokenLogprob(98, -1.5, 7)]
            stream.push(Delta(0, "c", [99], [scored], prompt, done(stream.request, 1)))
            reply = await call
        entry = reply.choices[0].logprobs[0]
        assert (entry.token_id, entry.logprob, entry.rank) == (99, -0.5, 2)
        assert (list(entry.top_token_ids), list(entry.top_logprobs)) == ([98, 99], [-0.25, -0.5])
        first, second = reply.prompt_logprobs
        assert first.token_id == 97 and not first.HasField("logprob")
        assert (second.token_id, second.logprob, second.rank) == (98, -1.5, 7)

    asyncio.run(scene())


def test_tokens_become_text_again():
    async def scene():
        async with serving(FakeReplica()) as client:
            assert await client.detokenize([2, 97, 98]) == "ab"
            assert await client.detokenize([2, 97, 98], skip_special_tokens=False) == "\x02ab"
            with pytest.raises(InvalidArgument, match=r"token_ids\[1\]: got 128; expected a token id in 0..V-1"):
                await client.detokenize([97, 128])

    asyncio.run(scene())


def test_the_server_lists_its_model():
    async def scene():
        async with serving(FakeReplica(info=Info(defaults={"top_k": 20}))) as client:
            return await client.models()

    (model,) = asyncio.run(scene())
    assert (model.name, model.revision, model.context_length, model.vocab_size) == ("tiny", "r1", 256, 128)
    assert list(model.eos_token_ids) == [0] and dict(model.defaults) == {"top_k": 20.0}


def test_abort_ends_a_stream_with_its_reason_and_says_whether_it_ran():
    async def scene():
        replica = FakeReplica()
        async with serving(replica) as client:
            call = asyncio.ensure_future(client.generate("ab", request_id="mine"))
            await until(lambda: replica.streams)
            assert await client.abort("mine") is True
            assert (await call).choices[0].finish_reason == "abort"
            assert await client.abort("mine") is False
            with pytest.raises(InvalidArgument, match="request_id"):
                await client.abort("")

    asyncio.run(scene())


def test_a_second_request_with_a_running_id_is_refused():
    async def scene():
        replica = FakeReplica()
        async with serving(replica) as client:
            call = asyncio.ensure_future(client.generate("ab", request_id="mine"))
            await until(lambda: replica.streams)
            with pytest.raises(AlreadyExists, match="request_id"):
                await client.generate("ab", request_id="mine")
            replica.abort("mine")
            await call

    asyncio.run(scene())


def test_a_choice_that_fails_ends_the_call_with_its_error():
    async def scene():
        replica = FakeReplica()
        async with serving(replica) as client:
            call = client.stream("ab", n=2)
            first = asyncio.ensure_future(anext(call))
            await until(lambda: replica.streams)
            stream = replica.streams[0]
            error = NumericError("numeric: non-finite logits at position 3")
            stream.push(Delta(0, "a", [97]), Delta(1, finish=done(stream.request, 0, "error", error=error)))
            assert (await first).text == "a"
            with pytest.raises(NumericError, match="position 3"):
                await anext(call)
            await until(lambda: stream.closed)

    asyncio.run(scene())


def test_an_unknown_model_or_adapter_is_not_found():
    async def scene():
        async with serving(FakeReplica(0.0)) as client:
            await client.generate("ab", model="tiny", max_tokens=1)
            with pytest.raises(NotFound, match="model: got 'large'; expected .*available: tiny") as caught:
                await client.generate("ab", model="large")
            assert caught.value.field == "model"
            with pytest.raises(NotFound, match="model"):
                await client.tokenize("ab", model="large")
            with pytest.raises(NotFound, match="adapter: got 'mine'"):
                await client.generate("ab", adapter="mine")

    asyncio.run(scene())


def test_the_deadline_of_a_call_is_that_of_the_request():
    async def scene():
        replica = FakeReplica()
        async with serving(replica) as client:
            with pytest.raises(DeadlineExceeded):
                await client.generate("ab", timeout_s=0.2)
            await until(lambda: replica.streams[0].closed)
            now = asyncio.get_running_loop().time()
            assert now - 0.5 < replica.opened[0].deadline_at < now + 0.2

    asyncio.run(scene())


def test_both_forms_of_generate_have_the_same_fields():
    for one, other in (
        (pb.GenerateRequest, pb.GenerateUnaryRequest),
        (pb.GenerateResponse, pb.GenerateUnaryResponse),
    ):
        described = [[(f.name, f.number, f.type) for f in kind.DESCRIPTOR.fields] for kind in (one, other)]
        assert described[0] == described[1]
