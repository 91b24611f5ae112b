"""A prefill and a decode replica: one computes the prompt, the other draws the tokens, as if one did it alone."""

import json
import secrets
import time

import grpc
import pytest

from engine.serve.client import Client
from tests.gateway.scene import Clients, Smg

common = pytest.importorskip("smg_grpc_proto.generated.common_pb2", reason="the extra smg is not installed")
pb = pytest.importorskip("smg_grpc_proto.generated.vllm_engine_pb2", reason="the extra smg is not installed")

PROMPT = "import os\nimport sys\n\n\nclass Reader:\n    def read(self, path):\n" * 3
WANTED = json.dumps({"do_remote_decode": True, "do_remote_prefill": False})


@pytest.fixture
def pair(make_replicas):
    return make_replicas((), (), secret=secrets.token_hex(32))


def ask(address: str, ids: list[int], paired: str, max_tokens: int, seed: int = 5):
    """The last message of a call of the contract."""
    request = pb.GenerateRequest(
        tokenized={"input_ids": ids},
        sampling_params={"max_tokens": max_tokens, "seed": seed, "temperature": 0.9},
        kv_transfer_params_json=paired,
    )
    with grpc.insecure_channel(address) as channel:
        call = channel.unary_stream(
            "/vllm.grpc.engine.VllmEngine/Generate",
            request_serializer=pb.GenerateRequest.SerializeToString,
            response_deserializer=pb.GenerateResponse.FromString,
        )
        return list(call(request, timeout=60))[-1].complete


def moved(replica) -> float:
    """Blocks that came to its lanes, or left them."""
    with Client(replica.address, admin=replica.admin) as client:
        return client.load()["moved_blocks"]


@pytest.mark.slow
def test_a_pair_draws_what_one_replica_draws_and_what_is_held_moves_once(programs, pair, tmp_path):
    """Real processes and a real gateway. Costs a minute; the first time up to five, for programs to compile."""
    prefill, decode = pair
    with Client(prefill.address) as client:
        ids = [int(token) for token in client.tokenize(PROMPT)]
    shown = ask(prefill.address, ids, WANTED, 1).kv_transfer_params_json
    together = ask(decode.address, ids, shown, 16)
    assert moved(decode) == -(-(len(ids) - 1) // 16), "all of the prompt came"
    alone = ask(prefill.address, ids, "", 16)
    assert list(together.output_ids) == list(alone.output_ids) and together.completion_tokens == 16
    assert list(ask(decode.address, ids, shown, 16).output_ids) == list(alone.output_ids), "a second claim"
    other = [*ids[:-9], *ids[:9]]
    told = json.loads(ask(prefill.address, other, WANTED, 1).kv_transfer_params_json)
    before, whole = moved(decode), list(ask(prefill.address, other, "", 16).output_ids)
    assert list(ask(decode.address, other, json.dumps(told | {"ticket": "00"}), 16).output_ids) == whole
    assert moved(decode) == before, "what is not proved is not believed"
    through_the_gateway(programs, pair, tmp_path)
    last = [*ids[9:], *ids[:9]]
    whole = list(ask(prefill.address, last, "", 16).output_ids)
    shown = ask(prefill.address, last, WANTED, 1).kv_transfer_params_json
    killed_at = prefill.kill()
    assert list(ask(decode.address, last, shown, 16).output_ids) == whole, "its holder is gone"
    assert time.monotonic() - killed_at < 15.0


def through_the_gateway(programs, pair, tmp_path):
    """The same again by SMG, which says who does what."""
    prefill, decode = pair
    arguments = ["--pd-disaggregation", "--prefill", f"grpc://{prefill.address}"]
    smg = Smg(programs, tmp_path / "smg.log", *arguments, "--decode", f"grpc://{decode.address}")
    try:
        smg.wait(healthy=2)
        prompts = ["def f(x):\n" * 8, "for line in lines:\n" * 6]
        options = {"max_tokens": 24, "temperature": 0.9, "seed": 11}
        before = moved(decode)
        asked = [("completion", {"prompt": prompt} | options) for prompt in prompts]
        answers = Clients(programs, smg.api, asked).end()
        after = moved(decode)
        with Client(prefill.address) as client:
            direct = [client.generate(prompt, **options).text for prompt in prompts]
        assert answers == [("ended", text) for text in direct], smg.log.read_text()[-3000:]
        assert after > before, "prompts came from the other replica"
    finally:
        smg.kill()
