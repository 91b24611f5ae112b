"""Kinds of fields: how one value of a message becomes entries of a flat map, and comes back.

    value --write(now)--> {short key: integer | number | switch | text | bytes} --read(now)--> value

A group writes the fields of a class into the same map, so that a Submit in an Expect is no deeper than either, and
no reader can be made to build more than its bytes. Tuples and arrays are byte strings of a fixed dtype,
little-endian. Moments travel as seconds from now, since no two machines have the same clock.

`read` raises Malformed for what is not of its kind or outside its bounds, and nothing else. A list of texts is one
byte string and the sizes of its texts.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import fields as fields_of
from typing import NamedTuple

import numpy as np

from engine.errors import Malformed, wrong

INT, WIDE, FLOAT, DOUBLE = (np.dtype(name) for name in ("<i4", "<i8", "<f4", "<f8"))
MOST = 2**63 - 1
MOST_TEXT = 1 << 16  # bytes of one text
Read = Callable[[Mapping, float], object]


class Field(NamedTuple):
    """`schema` has the types that every key it writes may have."""

    schema: Mapping[str, tuple[type, ...]]
    write: Callable[[object, float], dict]
    read: Read


def whole(key: str, least: int = 0, most: int = MOST, none: bool = False) -> Field:
    """An integer in least..most; with `none`, or None."""

    def read(got: Mapping, now: float) -> object:
        value = got[key]
        require(value is None or least <= value <= most, key, value, f"an integer in {least}..{most}")
        return value

    return Field({key: (int, type(None)) if none else (int,)}, lambda value, now: {key: _whole(value)}, read)


def real(key: str, none: bool = False) -> Field:
    """A finite number, whole or not: what comes is what went."""

    def read(got: Mapping, now: float) -> object:
        require(got[key] is None or math.isfinite(got[key]), key, got[key], "a finite number")
        return got[key]

    kinds = (float, int, type(None)) if none else (float, int)
    return Field({key: kinds}, lambda value, now: {key: value}, read)


def moment(key: str) -> Field:
    """Seconds on a clock, or None; on the way the seconds from now to it."""

    def write(value: object, now: float) -> dict:
        return {key: None if value is None else float(value) - now}  # type: ignore[arg-type]

    def read(got: Mapping, now: float) -> object:
        require(got[key] is None or math.isfinite(got[key]), key, got[key], "a finite number")
        return None if got[key] is None else now + got[key]

    return Field({key: (float, type(None))}, write, read)


def switch(key: str) -> Field:
    """True or False."""
    return Field({key: (bool,)}, lambda value, now: {key: bool(value)}, lambda got, now: got[key])


def text(key: str, most: int = MOST_TEXT, none: bool = False, one_of: tuple[str, ...] = ()) -> Field:
    """At most `most` bytes of text; with `one_of`, one of these."""

    def read(got: Mapping, now: float) -> object:
        value = got[key]
        if value is not None:
            require(len(value.encode()) <= most, key, f"{len(value)} characters", f"at most {most} bytes")
            require(not one_of or value in one_of, key, value, f"one of {', '.join(one_of)}")
        return value

    return Field({key: (str, type(None)) if none else (str,)}, lambda value, now: {key: value}, read)


def octets(key: str, most: int = MOST_TEXT) -> Field:
    """At most `most` bytes."""

    def read(got: Mapping, now: float) -> object:
        require(len(got[key]) <= most, key, f"{len(got[key])} bytes", f"at most {most}")
        return got[key]

    return Field({key: (bytes,)}, lambda value, now: {key: bytes(value)}, read)  # type: ignore[call-overload]


def array(key: str, dtype: np.dtype, width: int = 0, none: bool = False) -> Field:
    """An array [k], or [k, width]; it cannot be written. With `none`, or None."""

    def write(value: object, now: float) -> dict:
        return {key: None if value is None else np.asarray(value, dtype).tobytes()}

    def read(got: Mapping, now: float) -> object:
        return None if got[key] is None else from_bytes(key, got[key], dtype, width)

    return Field({key: (bytes, type(None)) if none else (bytes,)}, write, read)


def wholes(key: str, dtype: np.dtype = WIDE) -> Field:
    """A tuple of integers of any sign."""
    return Field(
        {key: (bytes,)},
        lambda value, now: {key: np.asarray(value, dtype).tobytes()},
        lambda got, now: tuple(from_bytes(key, got[key], dtype).tolist()),
    )


def pairs(key: str, dtypes: tuple[np.dtype, np.dtype]) -> Field:
    """A tuple of pairs of numbers, as two arrays; the second ones are finite."""
    keys = f"{key}0", f"{key}1"

    def write(value: object, now: float) -> dict:
        columns = list(zip(*value, strict=True)) if value else ((), ())  # type: ignore[call-overload]
        return {k: np.asarray(c, d).tobytes() for k, c, d in zip(keys, columns, dtypes, strict=True)}

    def read(got: Mapping, now: float) -> object:
        first, second = (from_bytes(k, got[k], d) for k, d in zip(keys, dtypes, strict=True))
        require(len(first) == len(second), key, f"{len(first)} and {len(second)}", "as many of one as of the other")
        require(bool(np.isfinite(second).all()), key, "other numbers", "finite ones")
        return tuple(zip(first.tolist(), second.tolist(), strict=True))

    return Field(dict.fromkeys(keys, (bytes,)), write, read)


def texts(key: str) -> Field:
    """A tuple of texts."""
    sizes_key = f"{key}#"

    def write(value: object, now: float) -> dict:
        encoded = [each.encode() for each in value]  # type: ignore[attr-defined]
        return {key: b"".join(encoded), sizes_key: np.array([len(each) for each in encoded], INT).tobytes()}

    def read(got: Mapping, now: float) -> object:
        sizes = from_bytes(key, got[sizes_key], INT).tolist()
        fit = all(size >= 0 for size in sizes) and sum(sizes) == len(got[key])
        require(fit, key, "sizes that are not those of its texts", "as many bytes as they say")
        found, start = [], 0
        for size in sizes:
            try:
                found.append(got[key][start : start + size].decode())
            except UnicodeDecodeError:
                raise Malformed(wrong(key, "bytes that are no text", "UTF-8")) from None
            start += size
        return tuple(found)

    return Field({key: (bytes,), sizes_key: (bytes,)}, write, read)


def group(
    kind: Callable,
    *fields: Field,
    holds: Callable[[object], bool] = lambda value: True,
    without: tuple[str, ...] = (),
) -> Field:
    """All fields of class `kind`, in their order. What comes must be such that it `holds`.

    The last ones, those `without`, do not travel: what comes has their defaults.
    """
    every = kind._fields if hasattr(kind, "_fields") else tuple(each.name for each in fields_of(kind))  # type: ignore[arg-type]
    names = every[: len(every) - len(without)]
    assert names + tuple(without) == tuple(every), f"{kind}: only its last fields can stay behind"
    assert len(names) == len(fields), f"{kind} has other fields"
    schema: dict[str, tuple[type, ...]] = {}
    for field in fields:
        assert not schema.keys() & field.schema.keys(), f"{kind}: a key stands twice"
        schema |= field.schema

    def write(value: object, now: float) -> dict:
        entries: dict = {}
        for name, field in zip(names, fields, strict=True):
            entries |= field.write(getattr(value, name), now)
        return entries

    def read(got: Mapping, now: float) -> object:
        value = kind(*(field.read(got, now) for field in fields))
        if not holds(value):
            raise Malformed(f"{kind.__name__}: got fields that contradict each other")
        return value

    return Field(schema, write, read)


def from_bytes(key: str, data: bytes, dtype: np.dtype, width: int = 0) -> np.ndarray:
    """The array [k], or [k, width], whose bytes these are."""
    size = dtype.itemsize * (width or 1)
    require(len(data) % size == 0, key, f"{len(data)} bytes", f"a multiple of {size}")
    found = np.frombuffer(data, dtype)
    return found.reshape(-1, width) if width else found


def require(holds: bool, key: str, got: object, expected: str) -> None:
    """Raise Malformed unless it holds."""
    if not holds:
        raise Malformed(wrong(key, got, expected))


def _whole(value: object) -> int | None:
    return None if value is None else int(value)  # type: ignore[call-overload]
