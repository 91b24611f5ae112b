"""The contract of gateways: what it answers, what it refuses and with which code, and whom it tells of blocks."""

import asyncio
import hashlib
import io
import json
import re
import subprocess
import zipfile
from contextlib import asynccontextmanager

import grpc
import numpy as np
import pytest
from fake_replica import Delta, FakeReplica, Info, TokenLogprob, done, until
from grpc_health.v1 import health_pb2, health_pb2_grpc

from engine import embedded
from engine.clock import ManualClock
from engine.core import prefix
from engine.core.directory import Directory
from engine.core.messages import Blocks
from engine.errors import ConfigError, Unavailable
from engine.replica.loads import LaneLoad
from engine.serve.access import Access
from engine.serve.server import Listen, Server

common = pytest.importorskip("smg_grpc_proto.generated.common_pb2", reason="the extra smg is not installed")
pb = pytest.importorskip("smg_grpc_proto.generated.vllm_engine_pb2", reason="the extra smg is not installed")

from engine.serve.vllm_engine import events, facts, tokenizer  # noqa: E402
from engine.serve.vllm_engine.service import VllmEngineService, descriptor  # noqa: E402

START = prefix.start(b"root", "", b"")
METHODS = {method.name: method for method in descriptor().methods}


class Worker(FakeReplica):
    """A replica without a model, with a directory of blocks."""

    def __init__(self, step_s: float | None = None, **info):
        super().__init__(step_s, Info(**info))
        self.text.folder = embedded.folder()
        self.directory, self.flushed = Directory(START), 0
        self.pairing, self.offers, self.closed = None, [], []

    def load(self) -> dict:
        lanes = {"running": 3, "waiting": 2, "rows": 8, "blocks": 100, "blocks_available": 75, "queued_tokens": 40}
        return lanes | {"prompt_tokens": 200, "cached_tokens": 50, "generated_tokens": 1000, "lanes": 2}

    def read_blocks(self, wake):
        return self.directory.open(wake)

    def close_blocks(self, reader) -> None:
        self.directory.close(reader)

    def forget_blocks(self) -> None:
        self.flushed += 1

    def offer(self, request, told) -> int:
        self.offers.append((request, told))
        return len(self.offers)

    def close_offer(self, number) -> None:
        self.closed.append(number)


@asynccontextmanager
async def serving(worker, channel=grpc.aio.insecure_channel, access=None, **listen):
    """A server that speaks the contract; yields a function that makes a call of it."""
    clock = ManualClock()

    def door(inference, gate):
        return descriptor(), VllmEngineService(worker, inference, gate, clock, "1", lambda: 0.0)

    places = Listen(port=0, admin_port=0, access=access or Access(), **listen)
    server = Server(worker, worker, places, clock, version="1", doors=[door])
    public, _ = await server.start()
    try:
        async with channel(public) as opened:
            yield Caller(opened, public)
    finally:
        await server.stop()


class Caller:
    def __init__(self, channel, address):
        self.channel, self.server_address = channel, address

    def __call__(self, name: str, request=None):
        method = METHODS[name]
        request = request if request is not None else _class(method.input_type)()
        kind = self.channel.unary_stream if method.server_streaming else self.channel.unary_unary
        call = kind(
            f"/vllm.grpc.engine.VllmEngine/{name}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=_class(method.output_type).FromString,
        )
        return call(request, timeout=10)

    async def error(self, name: str, request=None) -> grpc.aio.AioRpcError:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            call = self(name, request)
            if METHODS[name].server_streaming:
                async for _ in call:
                    pass
            else:
                await call
        return caught.value


def _class(descriptor):
    return getattr(common, descriptor.name, None) or getattr(pb, descriptor.name)


def ask(ids=(5, 6, 7), stream=True, **sampling):
    rest = {
        name: sampling.pop(name) for name in list(sampling) if name in pb.GenerateRequest.DESCRIPTOR.fields_by_name
    }
    return pb.GenerateRequest(
        request_id="r", tokenized={"input_ids": ids}, stream=stream, sampling_params=sampling, **rest
    )


def test_a_stream_brings_token_ids_choice_by_choice_and_ends_each_with_all_of_it():
    async def scene():
        worker = Worker(0.001)
        async with serving(worker) as call:
            parts = [part async for part in call("Generate", ask(max_tokens=3, n=2))]
        for index in range(2):
            chunks = [part.chunk for part in parts if part.HasField("chunk") and part.chunk.index == index]
            (complete,) = [p.complete for p in parts if p.HasField("complete") and p.complete.index == index]
            assert [token for chunk in chunks for token in chunk.token_ids] == [97, 98, 99]
            assert [chunk.completion_tokens for chunk in chunks][-1] == 3 and chunks[0].prompt_tokens == 3
            assert list(complete.output_ids) == [97, 98, 99] and complete.finish_reason == "length"
            assert (complete.prompt_tokens, complete.completion_tokens, complete.index) == (3, 3, index)
        assert worker.opened[0].prompt_ids == (5, 6, 7) and not worker.running

    asyncio.run(scene())


def test_without_a_stream_each_choice_comes_once_and_whole():
    async def scene():
        async with serving(Worker(0.001)) as call:
            parts = [part async for part in call("Generate", ask(max_tokens=3, n=2, stream=False))]
        assert [part.WhichOneof("response") for part in parts] == ["complete", "complete"]
        assert [list(part.complete.output_ids) for part in parts] == [[97, 98, 99]] * 2

    asyncio.run(scene())


def test_every_parameter_of_the_contract_reaches_the_request():
    async def scene():
        worker = Worker(0.0)
        async with serving(worker) as call:
            given = {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "frequency_penalty": 0.5}
            given |= {"presence_penalty": -0.5, "repetition_penalty": 1.1, "seed": 9, "n": 2, "logprobs": 3}
            stopping = {"max_tokens": 4, "min_tokens": 2, "stop": ["x"], "stop_token_ids": [7], "ignore_eos": True}
            more = {"include_stop_str_in_output": True, "prompt_logprobs": 1, "logit_bias": {8: -1.3}}
            more |= {"skip_special_tokens": False, "spaces_between_special_tokens": True}
            async for _ in call("Generate", ask(**given, **stopping, **more)):
                pass
        (request,) = worker.opened
        sampling, seen = request.sampling, request.stopping
        assert {name: getattr(sampling, name) for name in given} == given, "0.9 is 0.9, as it was written"
        assert sampling.logit_bias == ((8, -1.3),) and sampling.prompt_logprobs == 1
        assert (seen.max_tokens, seen.min_tokens, seen.stop, seen.stop_token_ids) == (4, 2, ("x",), (7,))
        assert seen.include_stop and seen.ignore_eos and not request.skip_special_tokens

    asyncio.run(scene())


def test_what_is_not_given_is_the_models_default():
    async def scene():
        worker = Worker(0.0, defaults={"temperature": 0.6, "top_p": 0.95})
        async with serving(worker) as call:
            async for _ in call("Generate", ask(max_tokens=1)):
                pass
            async for _ in call("Generate", pb.GenerateRequest(text="ab", sampling_params={"temperature": 0})):
                pass
        first, second = worker.opened
        assert (first.sampling.temperature, first.sampling.top_p, first.sampling.n) == (0.6, 0.95, 1)
        assert second.sampling.temperature == 0 and second.stopping.max_tokens is None
        assert second.prompt_ids == (2, 97, 98) and second.request_id and first.sampling.seed is not None

    asyncio.run(scene())


@pytest.mark.parametrize(
    ("request_", "code", "words"),
    [
        (ask(json_schema="{}"), "UNIMPLEMENTED", "json_schema: got one; expected none: there are no grammars"),
        (ask(choice={"choices": ["a"]}), "UNIMPLEMENTED", "choice"),
        (ask(grammar_from_first_token=True), "UNIMPLEMENTED", "grammar_from_first_token"),
        (ask(truncate_prompt_tokens=5), "UNIMPLEMENTED", "truncate_prompt_tokens: .*never cut"),
        (ask(mm_inputs={}), "UNIMPLEMENTED", "mm_inputs: .*text alone"),
        (ask(media_refs={}), "UNIMPLEMENTED", "media_refs"),
        (ask(kv_transfer_params={"remote_host": "h"}), "UNIMPLEMENTED", "kv_transfer_params"),
        (ask(kv_transfer_params_json="{}"), "UNIMPLEMENTED", "kv_transfer_params_json: .*no partners"),
        (ask(data_parallel_rank=1), "INVALID_ARGUMENT", "data_parallel_rank: got 1; expected 0"),
        (ask(ids=()), "INVALID_ARGUMENT", "prompt: .*empty"),
        (ask(ids=(5, 128)), "INVALID_ARGUMENT", r"prompt_ids\[1\]: got 128"),
        (ask(ids=range(5, 105), max_tokens=300), "INVALID_ARGUMENT", "max_tokens: got 300; expected .* 1..156"),
        (ask(temperature=-1), "INVALID_ARGUMENT", "temperature"),
        (ask(top_p=2), "INVALID_ARGUMENT", "top_p: got 2"),
        (ask(seed=-1), "INVALID_ARGUMENT", "seed: got -1"),
        (ask(logprobs=-1), "INVALID_ARGUMENT", "logprobs: got -1; expected .*0..20"),
        (ask(n=129), "INVALID_ARGUMENT", "n: got 129"),
        (ask(stop_token_ids=[999]), "INVALID_ARGUMENT", "stop_token_ids"),
        (pb.GenerateRequest(request_id="r"), "INVALID_ARGUMENT", "prompt: got none"),
        (pb.GenerateRequest(request_id="ü", text="a"), "INVALID_ARGUMENT", "request_id"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(request_, code, words):
    async def scene():
        worker = Worker(0.0)
        async with serving(worker) as call:
            error = await call.error("Generate", request_)
            assert error.code().name == code and not worker.opened
            assert re.search(words, error.details()), error.details()
            async for _ in call("Generate", ask(max_tokens=1)):
                pass

    asyncio.run(scene())


def test_scores_come_with_their_tokens_and_the_prompts_once():
    async def scene():
        worker = Worker()
        async with serving(worker) as call:
            stream = call("Generate", ask(max_tokens=2, logprobs=1, prompt_logprobs=1))
            reading = asyncio.ensure_future(_all(stream))
            await until(lambda: worker.streams)
            scored = [TokenLogprob(97, -0.5, 1, [(97, -0.5)])]
            prompt = [None, TokenLogprob(6, -1.0, 2, [(9, -0.25)]), TokenLogprob(7, -2.0, 1, [(7, -2.0)])]
            worker.streams[0].push(Delta(0, "a", [97], logprobs=scored, prompt_logprobs=prompt))
            await until(lambda: not worker.streams[0].waiting)
            request = worker.streams[0].request
            worker.streams[0].push(
                Delta(0, "b", [98], logprobs=[TokenLogprob(98, -0.75)], finish=done(request, 2, "stop", stop=98))
            )
            parts = await reading
        first, last, complete = parts[0].chunk, parts[-2].chunk, parts[-1].complete
        assert list(first.output_logprobs.token_logprobs) == [-0.5]
        assert [list(each.token_ids) for each in first.output_logprobs.top_logprobs] == [[97]]
        scores = first.input_logprobs
        assert list(scores.token_ids) == [5, 6, 7] and not scores.token_logprobs[0].HasField("value")
        assert [each.value for each in scores.token_logprobs[1:]] == [-1.0, -2.0]
        assert not last.HasField("input_logprobs") and list(complete.output_logprobs.token_logprobs) == [
            -0.5,
            -0.75,
        ]
        assert complete.matched_token_id == 98 and complete.finish_reason == "stop"
        assert complete.HasField("input_logprobs")

    asyncio.run(scene())


async def _all(stream) -> list:
    return [part async for part in stream]


def test_abort_ends_a_request_and_asking_twice_or_for_none_is_no_error():
    async def scene():
        worker = Worker()
        async with serving(worker) as call:
            reading = asyncio.ensure_future(_all(call("Generate", ask())))
            await until(lambda: worker.running)
            await call("Abort", pb.AbortRequest(request_ids=["r", "nobody"]))
            assert (await reading)[-1].complete.finish_reason == "abort"
            await call("Abort", pb.AbortRequest(request_ids=["r"]))
            await call("Abort")

    asyncio.run(scene())


def test_a_client_that_leaves_frees_its_request():
    async def scene():
        worker = Worker()
        async with serving(worker) as call:
            stream = call("Generate", ask())
            await until(lambda: worker.running)
            stream.cancel()
            await until(lambda: not worker.running)

    asyncio.run(scene())


def test_health_follows_readiness_under_this_name_too():
    async def scene():
        worker = Worker(0.0)
        async with serving(worker) as call:
            assert (await call("HealthCheck")).healthy
            check = health_pb2_grpc.HealthStub(call.channel).Check
            status = await check(health_pb2.HealthCheckRequest(service="vllm.grpc.engine.VllmEngine"))
            assert status.status == health_pb2.HealthCheckResponse.SERVING
            worker.ready = False
            answer = await call("HealthCheck")
            assert not answer.healthy and answer.message == "not ready"
            assert (await call.error("Generate", ask())).code() is grpc.StatusCode.UNAVAILABLE

    asyncio.run(scene())


def test_a_server_says_what_it_is_and_how_busy_its_lanes_are_together():
    async def scene():
        worker = Worker(0.0, defaults={"temperature": 0.6})
        worker.lanes = [LaneLoad("p0", "prefill"), LaneLoad("d1", "decode")]
        async with serving(worker) as call:
            model, server = await call("GetModelInfo"), await call("GetServerInfo")
            loads = await call("GetLoads")
            refused = await call.error("GetLoads", pb.GetLoadsRequest(dp_rank=1))
        assert (model.served_model_name, model.max_context_length, model.vocab_size) == ("tiny", 256, 128)
        assert list(model.eos_token_ids) == [0] and json.loads(model.default_sampling_params_json)
        assert model.is_generation and model.architectures and "/" not in model.model_path + model.tokenizer_path
        assert (server.server_type, server.data_parallel_size, server.max_num_seqs) == ("vllm-grpc", 1, 8)
        assert server.block_size == 16 and server.kv_connector == ""
        (load,) = loads.loads
        assert loads.dp_rank_count == 1 and loads.timestamp.startswith("1970-01-01T00:00")
        assert (load.num_running_reqs, load.num_waiting_reqs, load.num_total_reqs) == (3, 2, 5)
        assert (load.num_used_tokens, load.max_total_num_tokens, load.token_usage) == (400, 1600, 0.25)
        assert (load.max_running_requests, load.num_waiting_uncached_tokens, load.cache_hit_rate) == (8, 40, 0.25)
        assert refused.code() is grpc.StatusCode.INVALID_ARGUMENT

    asyncio.run(scene())


def test_throughput_is_what_was_generated_since_the_last_look():
    worker, loads = Worker(), facts.Loads()
    tokens = {"generated_tokens": 0.0}
    worker.load = lambda: tokens
    rates = []
    for now, count in ((0.0, 0), (0.5, 1000), (2.0, 1000), (4.0, 1300)):
        tokens["generated_tokens"] = count
        rates.append(loads.read(worker, now, "1", "").loads[0].gen_throughput)
    assert rates == [0.0, 0.0, 500.0, 150.0]


def test_the_tokenizers_zip_is_the_same_bytes_each_time_and_bears_its_digest(tmp_path, monkeypatch):
    for name in ("tokenizer.json", "tokenizer_config.json", "chat.jinja", "model.safetensors", "secret.txt"):
        (tmp_path / name).write_text(name * 50)
    packed = tokenizer.pack(tmp_path)
    (tmp_path / "tokenizer.json").touch()
    (tmp_path / "tokenizer.json").chmod(0o600)
    assert tokenizer.pack(tmp_path) == packed
    archive = zipfile.ZipFile(io.BytesIO(packed))
    assert archive.namelist() == ["chat.jinja", "tokenizer.json", "tokenizer_config.json"]
    assert {info.date_time[0] for info in archive.infolist()} == {1980}
    monkeypatch.setattr(tokenizer, "CHUNK_BYTES", 100)

    async def scene():
        worker = Worker(0.0)
        worker.text.folder = tmp_path
        async with serving(worker) as call:
            return await _all(call("GetTokenizer")), await _all(call("GetTokenizer"))

    parts, again = asyncio.run(scene())
    assert parts == again and b"".join(part.data for part in parts) == packed and len(parts) > 2
    assert [part.sha256 for part in parts] == [""] * (len(parts) - 1) + [hashlib.sha256(packed).hexdigest()]


def test_a_flush_waits_for_what_runs_and_leaves_it_alone():
    async def scene():
        worker = Worker()
        async with serving(worker) as call:
            assert (await call("FlushCache")).success and worker.flushed == 1
            reading = asyncio.ensure_future(_all(call("Generate", ask())))
            await until(lambda: worker.running)
            answer = await call("FlushCache", common.FlushCacheRequest(timeout_s=0.01))
            assert not answer.success and "1 requests run" in answer.message and worker.flushed == 1
            waiting = call("FlushCache", common.FlushCacheRequest(timeout_s=5))
            worker.abort("r")
            await reading
            assert (await waiting).success and worker.flushed == 2
            for timeout_s in (-1.0, float("nan")):
                error = await call.error("FlushCache", common.FlushCacheRequest(timeout_s=timeout_s))
                assert error.code() is grpc.StatusCode.INVALID_ARGUMENT

    asyncio.run(scene())


@pytest.mark.parametrize("name", ["Embed", "StartProfile", "StopProfile"])
def test_what_the_contract_knows_and_nobody_serves_is_unimplemented(name):
    async def scene():
        async with serving(Worker()) as call:
            error = await call.error(name)
            assert error.code() is grpc.StatusCode.UNIMPLEMENTED and ": " in error.details()

    asyncio.run(scene())


# -- pairs ---------------------------------------------------------------------------------------------------------


def test_a_prompt_for_another_replica_is_answered_without_tokens_and_with_what_that_one_shows():
    async def scene():
        worker = Worker(0.0)
        worker.pairing = object()
        async with serving(worker) as call:
            info = await call("GetServerInfo")
            assert (info.kv_connector, info.kv_role) == ("NixlConnector", "kv_both")
            first = ask(max_tokens=1, kv_transfer_params_json='{"do_remote_decode": true}')
            reading = asyncio.ensure_future(_all(call("Generate", first)))
            await until(lambda: worker.offers)
            worker.offers[0][1]('{"shown": 1}')
            (answer,) = await reading
            complete = answer.complete
            assert complete.kv_transfer_params_json == '{"shown": 1}' and not complete.output_ids
            assert (complete.prompt_tokens, complete.completion_tokens) == (3, 0) and worker.closed == [1]
            second = ask(max_tokens=2, kv_transfer_params_json=complete.kv_transfer_params_json)
            parts = await _all(call("Generate", second))
            assert list(parts[-1].complete.output_ids) == [97, 98] and worker.paired == '{"shown": 1}'

    asyncio.run(scene())


def test_a_prompt_that_cannot_be_held_is_an_error_and_one_that_nobody_waits_for_is_let_go():
    async def scene():
        worker = Worker(0.0)
        worker.pairing = object()
        wanted = ask(kv_transfer_params_json='{"do_remote_decode": true}')
        async with serving(worker) as call:
            reading = asyncio.ensure_future(call.error("Generate", wanted))
            await until(lambda: worker.offers)
            worker.offers[0][1](Unavailable("replica: gone"))
            assert (await reading).code() is grpc.StatusCode.UNAVAILABLE
            leaving = call("Generate", wanted)
            await until(lambda: len(worker.offers) == 2)
            leaving.cancel()
            await until(lambda: worker.closed == [1, 2])
            worker.offers[1][1]("{}")  # too late, and no harm
            for text in ("[]", "{", '"x"', "{" + " " * 9000 + "}"):
                error = await call.error("Generate", ask(kv_transfer_params_json=text))
                assert error.code() is grpc.StatusCode.INVALID_ARGUMENT, text

    asyncio.run(scene())


# -- blocks --------------------------------------------------------------------------------------------------------


def chain(tokens, start=START):
    return prefix.extend(start, (), np.array(tokens, np.int32), 16)


A, B, C = chain(range(48))
(OTHER,) = chain(range(90, 106))
(SALTED,) = chain(range(16), prefix.start(b"root", "", b"salt"))


def news(*contents):
    return tuple((content.key, content) for content in contents)


def test_without_certificates_on_both_ends_nobody_hears_of_blocks():
    async def scene():
        worker = Worker()
        async with serving(worker) as call:
            error = await call.error("SubscribeKvEvents")
            assert error.code() is grpc.StatusCode.PERMISSION_DENIED
            assert "mutual TLS: --tls-cert, --tls-key and --tls-client-ca" in error.details()
            assert not worker.directory.read

    asyncio.run(scene())


def test_a_hash_is_the_first_eight_bytes_of_the_chains_key_as_a_signed_number():
    assert A.key == prefix.digest(START, np.arange(16, dtype=np.int32).tobytes())
    assert events.block_hash(A.key).to_bytes(8, "big", signed=True) == A.key[:8]
    assert events.block_hash(b"\xff" * 32) == -1


def test_blocks_that_follow_each_other_are_one_event_and_name_the_block_before_them():
    stored, other, gone, late = events.written([*news(A, B, OTHER), (A.key, None), (B.key, None), *news(C)])
    assert [block.block_hash for block in stored.stored.blocks] == [events.block_hash(c.key) for c in (A, B)]
    assert list(stored.stored.blocks[1].token_ids) == list(range(16, 32))
    assert stored.stored.blocks[0].block_size == 16
    assert not stored.stored.HasField("parent_block_hash") and not other.stored.HasField("parent_block_hash")
    assert list(gone.removed.block_hashes) == [events.block_hash(c.key) for c in (A, B)]
    assert late.stored.parent_block_hash == events.block_hash(B.key)


def test_a_stream_begins_with_all_that_is_stored_behind_the_number_its_reader_knows(monkeypatch):
    monkeypatch.setattr(events, "BATCH_BLOCKS", 2)
    stream = events.Events(after=41)
    batches = [*stream.snapshot([A, B, OTHER], 1.0), *stream.changes([(A.key, None), *news(C)], 2.0)]
    batches += stream.changes([(C.key, None)], 3.0)
    assert [batch.sequence_number for batch in batches] == [42, 43, 44, 45]
    chunks = [batch.snapshot for batch in batches[:2]]
    assert [(chunk.index, chunk.count, chunk.blocks) for chunk in chunks] == [(0, 2, 3), (1, 2, 3)]
    assert batches[0].events[0].HasField("cleared") and batches[1].events[0].HasField("stored")
    assert not batches[2].HasField("snapshot")
    assert [[event.event_id for event in batch.events] for batch in batches] == [[0, 0], [0], [1, 2], [3]]
    (empty,) = events.Events(0).snapshot([], 1.0)
    assert (empty.snapshot.count, empty.sequence_number) == (1, 1) and empty.events[0].HasField("cleared")


@pytest.fixture(scope="module")
def mutual(tmp_path_factory):
    """A CA, and a certificate that it signed for both ends."""
    folder = tmp_path_factory.mktemp("tls")
    ca, ca_key, cert, key, ask = (folder / name for name in ("ca.pem", "ca.key", "one.pem", "one.key", "one.csr"))
    (folder / "names").write_text("subjectAltName=IP:127.0.0.1\n")
    commands = (
        f"req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=ca -keyout {ca_key} -out {ca}",
        f"req -newkey rsa:2048 -nodes -subj /CN=one -keyout {key} -out {ask}",
        f"x509 -req -in {ask} -CA {ca} -CAkey {ca_key} -CAcreateserial -days 2 -extfile {folder}/names -out {cert}",
    )
    for command in commands:
        try:
            subprocess.run(["openssl", *command.split()], check=True, capture_output=True)
        except FileNotFoundError:
            pytest.skip("needs the openssl command to make certificates")
    key.chmod(0o600)
    return ca, cert, key


def test_under_mutual_tls_a_subscriber_hears_of_every_block_as_it_comes_and_goes(mutual):
    ca, cert, key = mutual
    access = Access(tls_cert=cert, tls_key=key, tls_client_ca=ca)
    ours = grpc.ssl_channel_credentials(ca.read_bytes(), key.read_bytes(), cert.read_bytes())
    stranger = grpc.ssl_channel_credentials(ca.read_bytes())

    async def scene():
        worker = Worker(0.0)
        worker.directory.open(lambda: None)
        worker.directory.receive("b0", Blocks(True, news(A, SALTED)))
        async with serving(worker, lambda address: grpc.aio.secure_channel(address, ours), access) as call:
            stream = call("SubscribeKvEvents", common.SubscribeKvEventsRequest(start_sequence_number=7))
            first = await stream.read()
            worker.directory.receive("b0", Blocks(False, news(B)))
            second = await stream.read()
            worker.directory.receive("b1", Blocks(True, news(A)))
            worker.directory.lost("b0")
            third = await stream.read()
            stream.cancel()
            await until(lambda: len(worker.directory._readers) == 1)
            worker.directory.check()
            async with grpc.aio.secure_channel(call.server_address, stranger) as channel:
                error = await Caller(channel, call.server_address).error("HealthCheck")
                assert error.code() is grpc.StatusCode.UNAVAILABLE, "who shows no certificate is not let in"
        return first, second, third

    first, second, third = asyncio.run(scene())
    assert [part.sequence_number for part in (first, second, third)] == [8, 9, 10]
    assert first.snapshot.blocks == 1 and list(first.events[1].stored.blocks[0].token_ids) == list(range(16))
    assert second.events[0].stored.parent_block_hash == events.block_hash(A.key)
    assert list(third.events[0].removed.block_hashes) == [events.block_hash(B.key)], "the other lane still has A"


def test_a_client_ca_needs_tls_and_certificates(mutual, tmp_path):
    ca, cert, key = mutual
    free = {"port": 0, "admin_port": 0}
    with pytest.raises(ConfigError, match="tls_client_ca: got one without TLS"):
        Listen(access=Access(tls_client_ca=ca), **free).check()
    (tmp_path / "none.pem").write_text("nothing")
    for path in (key, tmp_path / "none.pem", tmp_path / "missing"):
        with pytest.raises(ConfigError, match="tls_client_ca"):
            Listen(access=Access(tls_cert=cert, tls_key=key, tls_client_ca=path), **free).check()
