"""Bytes of a client -> a message, or InvalidArgument that says what is wrong with them.

Stock servers answer a message that does not parse with UNKNOWN and drop fields they do not know. Here both are the
client's error, by name: a field that nobody reads would change nothing and say nothing.
Cost: parsing plus two size computations in C; the walks below run only for a message that is refused.
"""

from collections.abc import Callable
from typing import TypeVar

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import DecodeError, Message
from google.protobuf.unknown_fields import UnknownFieldSet

from engine.errors import InvalidArgument

M = TypeVar("M", bound=Message)
LENGTH_DELIMITED = 2
MAX_DEPTH = 32


def parser(kind: type[M]) -> Callable[[bytes], M | InvalidArgument]:
    """A deserializer that returns its refusal instead of raising, so that a handler answers it with a status."""

    def read(data: bytes) -> M | InvalidArgument:
        try:
            return parse(kind, data)
        except InvalidArgument as error:
            return error

    return read


def parse(kind: type[M], data: bytes) -> M:
    """Raises InvalidArgument for bytes that are not a message of `kind`, text that is not UTF-8, unknown fields."""
    name = kind.DESCRIPTOR.full_name
    try:
        message = kind.FromString(data)
    except DecodeError:
        field = _not_utf8(kind.DESCRIPTOR, data, MAX_DEPTH)
        if field is not None:
            raise InvalidArgument(
                f"{field}: got bytes that are not UTF-8; expected UTF-8 text", field=field
            ) from None
        raise InvalidArgument(f"request: malformed protobuf; expected a {name}") from None
    size = message.ByteSize()
    message.DiscardUnknownFields()
    if message.ByteSize() != size:
        path = _unknown(kind.FromString(data)) or "?"
        raise InvalidArgument(f"request: malformed: unknown field {path}; expected the fields of {name}")
    return message


def _not_utf8(descriptor: Descriptor, data: bytes, depth: int) -> str | None:
    """The path of a string field in `data` whose bytes are not UTF-8, or None."""
    try:
        raw = UnknownFieldSet(Empty.FromString(data))
    except DecodeError:
        return None
    for item in raw:
        field = descriptor.fields_by_number.get(item.field_number)
        if field is None or item.wire_type != LENGTH_DELIMITED:
            continue
        if field.type == FieldDescriptor.TYPE_STRING:
            try:
                item.data.decode("utf-8")
            except UnicodeDecodeError:
                return str(field.name)
        elif field.type == FieldDescriptor.TYPE_MESSAGE and depth > 0:
            inner = _not_utf8(field.message_type, item.data, depth - 1)
            if inner is not None:
                return f"{field.name}.{inner}"
    return None


def _unknown(message: Message) -> str | None:
    """The path of a field of `message` that its type does not have, such as `sampling.17`, or None."""
    for item in UnknownFieldSet(message):
        return str(item.field_number)
    for field, value in message.ListFields():
        if field.type != FieldDescriptor.TYPE_MESSAGE or field.message_type.GetOptions().map_entry:
            continue
        for part in [value] if isinstance(value, Message) else value:
            inner = _unknown(part)
            if inner is not None:
                return f"{field.name}.{inner}"
    return None
