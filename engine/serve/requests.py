"""A message of a client -> the core's Request. Fields left out take the model's defaults, then the core's.

What a field may hold is decided by core.request.check_request, which the replica calls with its own limits; here
stand the checks that need the message: its prompt, its names, its salt.
"""

from collections.abc import Mapping
from dataclasses import fields

from engine.core.request import Request, Sampling, Stopping
from engine.errors import InvalidArgument, NotFound, wrong
from engine.serve.contract import ModelInfo, Text
from engine.serve.proto.serac.v1 import inference_pb2 as pb

SAMPLING_NUMBERS = tuple(field.name for field in fields(Sampling) if field.name != "logit_bias")
MAX_ID_CHARS = 128
MAX_SALT_BYTES = 128
INLINE_CHARS = 4096  # a longer text is encoded in a thread
LONG_CHARS_PER_TOKEN = 8  # a text longer than this times the context is first judged by its beginning
Generate = pb.GenerateRequest | pb.GenerateUnaryRequest


def check_model(name: str, info: ModelInfo) -> None:
    """Raises NotFound unless `name` is empty or the model served."""
    if name and name != info.name:
        raise NotFound(wrong("model", name, f"a model served here; available: {info.name}"), field="model")


def check_names(message: Generate, info: ModelInfo) -> None:
    """Raises for an unknown model or adapter and for ids and salts that are not well formed."""
    check_model(message.model, info)
    if message.adapter:
        raise NotFound(wrong("adapter", message.adapter, "no adapter; this model has none"), field="adapter")
    name = message.request_id
    if len(name) > MAX_ID_CHARS or not (name.isascii() and name.isprintable()):
        expected = f"at most {MAX_ID_CHARS} printable ASCII characters"
        raise InvalidArgument(wrong("request_id", name, expected), field="request_id")
    if len(message.cache_salt) > MAX_SALT_BYTES:
        got, expected = f"{len(message.cache_salt)} bytes", f"at most {MAX_SALT_BYTES}"
        raise InvalidArgument(wrong("cache_salt", got, expected), field="cache_salt")


def is_long(message: Generate | pb.TokenizeRequest) -> bool:
    """Whether encoding the prompt takes long enough to leave the event loop for."""
    if message.WhichOneof("prompt") == "chat":
        return sum(len(turn.content) for turn in message.chat.messages) > INLINE_CHARS
    return len(message.text) > INLINE_CHARS


def prompt_ids(message: Generate | pb.TokenizeRequest, text: Text, context: int) -> list[int]:
    """The prompt as token ids. A text that surely has more than `context` is refused before all is encoded."""
    kind = message.WhichOneof("prompt")
    if kind == "token_ids":
        return list(message.token_ids.ids)
    if kind == "chat":
        return _chat_ids(message.chat, text)
    if kind == "text":
        add_special = message.add_special_tokens if message.HasField("add_special_tokens") else True
        return _text_ids(message.text, text, add_special, context)
    choices = ", ".join(field.name for field in message.DESCRIPTOR.oneofs_by_name["prompt"].fields)
    raise InvalidArgument(f"prompt: got none; expected exactly one of {choices}", field="prompt")


def _text_ids(prompt: str, text: Text, add_special: bool, context: int) -> list[int]:
    if not prompt:
        raise InvalidArgument("prompt: got an empty text; expected at least one character", field="prompt")
    head = LONG_CHARS_PER_TOKEN * context
    if len(prompt) > head:
        known = len(text.encode(prompt[:head], add_special))
        if known > context + LONG_CHARS_PER_TOKEN:  # the cut may split a token, hence the margin
            got = f"a text of {len(prompt)} characters, more than {known} tokens"
            raise InvalidArgument(wrong("prompt", got, f"at most context length {context} - 1"), field="prompt")
    return text.encode(prompt, add_special)


def _chat_ids(chat: pb.Chat, text: Text) -> list[int]:
    if not chat.messages:
        raise InvalidArgument("prompt: got an empty chat; expected at least one message", field="prompt")
    messages = [{"role": turn.role, "content": turn.content} for turn in chat.messages]
    add = chat.add_generation_prompt if chat.HasField("add_generation_prompt") else True
    return text.encode_chat(messages, add_generation_prompt=add)


def read_sampling(message: pb.Sampling, defaults: Mapping[str, float]) -> Sampling:
    """Every number of the message, else of the generation config, else of the core."""
    given = {name: defaults[name] for name in SAMPLING_NUMBERS if name in defaults}
    given |= {name: getattr(message, name) for name in SAMPLING_NUMBERS if message.HasField(name)}
    return Sampling(**given, logit_bias=tuple((entry.token_id, entry.bias) for entry in message.logit_bias))


def read_stopping(message: pb.Stopping) -> Stopping:
    """When to stop, as asked."""
    return Stopping(
        max_tokens=message.max_tokens if message.HasField("max_tokens") else None,
        min_tokens=message.min_tokens,
        stop=tuple(message.stop),
        stop_token_ids=tuple(message.stop_token_ids),
        include_stop=message.include_stop,
        ignore_eos=message.ignore_eos,
    )


def read_request(
    message: Generate, ids: list[int], defaults: Mapping[str, float], deadline_at: float | None
) -> Request:
    """The request as the core takes it, its prompt already ids."""
    return Request(
        request_id=message.request_id,
        prompt_ids=tuple(ids),
        sampling=read_sampling(message.sampling, defaults),
        stopping=read_stopping(message.stopping),
        deadline_at=deadline_at,
        salt=message.cache_salt,
        adapter=message.adapter,
        skip_special_tokens=message.skip_special_tokens if message.HasField("skip_special_tokens") else True,
    )
