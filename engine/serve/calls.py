"""What both clients share: arguments -> messages, messages -> replies. No channel, no waiting.

Keyword arguments are the fields of Sampling, Stopping and GenerateRequest by name; a wrong one is answered with the
nearest right one.
"""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import grpc
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from engine.errors import InvalidArgument, wrong
from engine.serve.proto.serac.v1 import control_pb2
from engine.serve.proto.serac.v1 import inference_pb2 as pb

Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]
Parameter = float | str | bytes | Sequence[str] | Sequence[int] | Mapping[int, float] | None
SAMPLING = frozenset(pb.Sampling.DESCRIPTOR.fields_by_name)
STOPPING = frozenset(pb.Stopping.DESCRIPTOR.fields_by_name)
OTHERS = frozenset({"request_id", "model", "skip_special_tokens", "add_special_tokens", "cache_salt", "adapter"})
KINDS = {
    FieldDescriptor.CPPTYPE_INT64: "an integer in -2^63..2^63-1",
    FieldDescriptor.CPPTYPE_DOUBLE: "a number",
    FieldDescriptor.CPPTYPE_BOOL: "true or false",
    FieldDescriptor.CPPTYPE_STRING: "text",
    FieldDescriptor.CPPTYPE_MESSAGE: "a mapping of token id to number",
}
OPTIONS = (
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
)


@dataclass(frozen=True, slots=True)
class Choice:
    """One choice, or what is new of it."""

    index: int
    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[pb.TokenLogprob, ...] = ()
    finish_reason: str | None = None  # stop, length or abort
    stop: str | int | None = None  # the stop string or token that matched
    usage: pb.Usage | None = None


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer of the server, or a part of a streamed one."""

    request_id: str
    model: str
    revision: str
    seed: int
    choices: tuple[Choice, ...]
    prompt_logprobs: tuple[pb.TokenLogprob, ...] = field(default=(), repr=False)

    @property
    def text(self) -> str:
        """The text of the first choice, empty in a part that has none of it."""
        return next((choice.text for choice in self.choices if choice.index == 0), "")


def read_reply(message: pb.GenerateResponse | pb.GenerateUnaryResponse) -> Reply:
    """A message as a Reply."""
    return Reply(
        message.request_id,
        message.model,
        message.revision,
        message.seed,
        tuple(map(_read_choice, message.choices)),
        tuple(message.prompt_logprobs),
    )


def _read_choice(message: pb.Choice) -> Choice:
    finish = message.finish
    ended = message.HasField("finish")
    matched = finish.WhichOneof("matched")
    return Choice(
        message.index,
        message.text,
        tuple(message.token_ids),
        tuple(message.logprobs),
        pb.FinishReason.Name(finish.reason).removeprefix("FINISH_REASON_").lower() if ended else None,
        getattr(finish, matched) if matched else None,
        finish.usage if ended else None,
    )


def join(parts: Iterable[Reply]) -> Reply | None:
    """The whole reply of a stream's parts, None of no parts."""
    whole: Reply | None = None
    choices: dict[int, Choice] = {}
    for part in parts:
        whole = (
            part if whole is None else replace(whole, prompt_logprobs=whole.prompt_logprobs + part.prompt_logprobs)
        )
        for new in part.choices:
            old = choices.get(new.index, Choice(new.index))
            choices[new.index] = replace(
                new,
                text=old.text + new.text,
                token_ids=old.token_ids + new.token_ids,
                logprobs=old.logprobs + new.logprobs,
            )
    return None if whole is None else replace(whole, choices=tuple(choices[k] for k in sorted(choices)))


def write_prompt(message: Message, prompt: Prompt) -> None:
    """A str is text, a sequence of ints is token ids, a sequence of {role, content} is a chat."""
    if isinstance(prompt, str):
        message.text = prompt
    elif prompt and isinstance(prompt[0], Mapping):
        message.chat.messages.extend(pb.Message(role=turn["role"], content=turn["content"]) for turn in prompt)
    else:
        message.token_ids.ids.extend(prompt)
        message.token_ids.SetInParent()


def write_generate(kind: type[Message], prompt: Prompt, parameters: Mapping[str, Parameter]) -> Message:
    """A request with every parameter that is not None in its place."""
    message = kind()
    write_prompt(message, prompt)
    for name, value in parameters.items():
        if value is None:
            continue
        part = message.sampling if name in SAMPLING else message.stopping if name in STOPPING else message
        if part is message and name not in OTHERS:
            raise InvalidArgument(_unknown(name), field=name)
        _write(part, name, value)
    return message


def write_tokenize(prompt: Prompt, parameters: Mapping[str, Parameter]) -> pb.TokenizeRequest:
    """A request for the ids of a text or chat."""
    message = pb.TokenizeRequest()
    write_prompt(message, prompt)
    for name, value in parameters.items():
        if name not in ("model", "add_special_tokens"):
            raise InvalidArgument(f"{name}: unknown parameter; expected model or add_special_tokens", field=name)
        _write(message, name, value)
    return message


def read_load(message: control_pb2.GetLoadResponse) -> dict[str, float]:
    """All gauges in one dict."""
    return {"open_requests": float(message.open_requests), **message.gauges}


def _write(part: Message, name: str, value: Parameter) -> None:
    try:
        if name == "logit_bias":
            part.logit_bias.extend(pb.LogitBias(token_id=token, bias=bias) for token, bias in value.items())
        elif name in ("stop", "stop_token_ids"):
            getattr(part, name).extend([value] if isinstance(value, (str, int)) else value)
        else:
            setattr(part, name, value)
    except (TypeError, ValueError, AttributeError):
        expected = KINDS[part.DESCRIPTOR.fields_by_name[name].cpp_type]
        raise InvalidArgument(wrong(name, value, expected), field=name) from None


def _unknown(name: str) -> str:
    near = difflib.get_close_matches(name, SAMPLING | STOPPING | OTHERS, n=1)
    return f"{name}: unknown parameter" + (f"; did you mean {near[0]}?" if near else "")


def channel_credentials(tls_ca: bytes | None) -> grpc.ChannelCredentials | None:
    """TLS with the given root certificates, None for plain text."""
    return None if tls_ca is None else grpc.ssl_channel_credentials(root_certificates=tls_ca)


def metadata(token: str | None) -> tuple[tuple[str, str], ...]:
    """What goes with each call."""
    return () if token is None else (("authorization", f"Bearer {token}"),)
