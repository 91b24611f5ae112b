"""A request of the contract -> the same request in the words of `serac.v1`, whose checks it then passes.

What the contract knows and this server does not serve is refused by name (`UNSERVED`), never left out in silence.
Zero stands for "not given" where the contract has no other way to say so, and then the model's default holds.

`spaces_between_special_tokens` and `stream` are no part of it: the first says how to write text, which the gateway
does, the second how to answer (engine/serve/vllm_engine/answers.py).
"""

from __future__ import annotations

from google.protobuf.message import Message

from engine.errors import InvalidArgument, Unsupported, wrong
from engine.serve.proto.serac.v1 import inference_pb2 as serac
from engine.serve.vllm_engine.stubs import vllm_engine_pb2 as pb

UNSERVED = {
    "kv_transfer_params": "kv_transfer_params_json says what this one would",
    "mm_inputs": "the model reads text alone",
    "extra_mm_inputs": "the model reads text alone",
    "media_refs": "the model reads text alone",
}
UNSERVED_SAMPLING = {
    "json_schema": "there are no grammars",
    "regex": "there are no grammars",
    "grammar": "there are no grammars",
    "structural_tag": "there are no grammars",
    "json_object": "there are no grammars",
    "choice": "there are no grammars",
    "grammar_from_first_token": "there are no grammars",
    "truncate_prompt_tokens": "a prompt is never cut",
}
GIVEN = ("temperature", "seed", "logprobs", "prompt_logprobs")  # optional in the contract too
UNLESS_ZERO = ("top_p", "top_k", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty", "n")


def read_generate(message: pb.GenerateRequest) -> serac.GenerateRequest:
    """Raises Unsupported or InvalidArgument, by field."""
    refuse(message, UNSERVED)
    refuse(message.sampling_params, UNSERVED_SAMPLING)
    if message.data_parallel_rank != 0:
        expected = "0, the only rank of this server"
        raise InvalidArgument(
            wrong("data_parallel_rank", message.data_parallel_rank, expected), field="data_parallel_rank"
        )
    request = serac.GenerateRequest(request_id=message.request_id)
    given = message.WhichOneof("input")
    if given == "text":
        request.text = message.text
    elif given == "tokenized":
        request.token_ids.ids.extend(message.tokenized.input_ids)
        request.token_ids.SetInParent()
    _read_sampling(message.sampling_params, request.sampling)
    _read_stopping(message.sampling_params, request.stopping)
    request.skip_special_tokens = message.sampling_params.skip_special_tokens
    return request


def refuse(message: Message, unserved: dict[str, str]) -> None:
    """Raises Unsupported for the first field of `message` that is set and not served."""
    for field, _ in message.ListFields():
        if field.name in unserved:
            raise Unsupported(f"{field.name}: got one; expected none: {unserved[field.name]}", field=field.name)


def _read_sampling(message: pb.SamplingParams, sampling: serac.Sampling) -> None:
    for name in GIVEN:
        if message.HasField(name):
            setattr(sampling, name, _as_written(getattr(message, name)))
    for name in UNLESS_ZERO:
        if getattr(message, name) != 0:
            setattr(sampling, name, _as_written(getattr(message, name)))
    for token, bias in sorted(message.logit_bias.items()):
        sampling.logit_bias.add(token_id=token, bias=_as_written(bias))


def _as_written(value: float) -> float:
    """0.9 and not 0.8999999761581421, which 32 bits make of it: a seed draws the same through either contract."""
    return value if isinstance(value, int) else float(f"{value:.7g}")


def _read_stopping(message: pb.SamplingParams, stopping: serac.Stopping) -> None:
    if message.HasField("max_tokens"):
        stopping.max_tokens = message.max_tokens
    stopping.min_tokens = message.min_tokens
    stopping.stop.extend(message.stop)
    stopping.stop_token_ids.extend(message.stop_token_ids)
    stopping.include_stop = message.include_stop_str_in_output
    stopping.ignore_eos = message.ignore_eos
