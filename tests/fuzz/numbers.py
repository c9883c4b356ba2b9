"""Every numeric field of a message, found in its declaration, and messages that hold a number there."""

import os
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Final, Literal, Never, TypeVar, Union, get_args, get_origin

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from pydantic import BaseModel

from inference_service.api.chat.request import AllowedTools, NamedTool
from tests.support.examples import SWEEPING

T = TypeVar("T")

NUMBERS: Final[tuple[float, ...]] = (
    0, -1, 1, 128, 129, 1024, 1025, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64 - 1, 2**64,
    -(2**31), -(2**63), 0.5, 5e-324, 1e-300, 1e-45, 1e-38, 1e38, 1e308, -1e308,
    float("nan"), float("inf"), float("-inf"),
)  # fmt: skip
LITERALS: Final = (
    *("NaN" if number != number else repr(number).replace("inf", "Infinity") for number in NUMBERS),
    "1e999", "-1e999", "1" * 400, "9" * 4300, "-" + "9" * 4300, "1" * 5000, "1." + "1" * 5000,
)  # fmt: skip
"""The same in JSON, and what is a number in JSON alone."""
HOLE: Final = 987654321987
"""Stands in a body where a literal is to be."""
Fill = Callable[[Any], Any]
"""Makes a value of a field out of a number."""
Path = tuple[FieldDescriptor, ...]


def in_turn(numbers: Sequence[T], turn: int, share: int) -> Sequence[T]:
    """Return every share-th number from a turn on; in a sweep return all numbers."""
    return numbers if os.environ.get(SWEEPING) else numbers[turn % share :: share]


def json_fields(kind: type[BaseModel]) -> Iterator[tuple[str, str, Any]]:
    """Yield (place, field, a value of it with a hole) for each number in the declaration of a body."""
    for name, field in kind.model_fields.items():
        for place, fill in _fills(field.annotation, field.alias or name):
            yield place, field.alias or name, fill(HOLE)


def _fills(kind: Any, place: str) -> Iterator[tuple[str, Fill]]:
    """Yield (place, how to make a value) for each number that a type can hold; unknown types are TypeErrors."""
    origin, inner = get_origin(kind), get_args(kind)
    if kind in (int, float):
        yield place, lambda number: number
    elif origin is Annotated:
        yield from _fills(inner[0], place)
    elif origin in (Union, UnionType):
        for each in inner:
            yield from _fills(each, place)
    elif origin in (list, tuple):
        yield from _around(_fills(inner[0], f"{place}[]"), lambda value: [value])
    elif origin is dict:
        yield from _around(_fills(inner[0], f"{place}{{key}}"), lambda key: {str(key): 0})
        yield from _around(_fills(inner[1], f"{place}{{}}"), lambda value: {"5": value})
    elif isinstance(kind, type) and issubclass(kind, BaseModel):
        for name, field in kind.model_fields.items():
            own = field.alias or name
            below = _fills(field.annotation, f"{place}.{own}")
            yield from _around(below, lambda value, own=own: {own: value})  # type: ignore[misc]
    elif kind is Any:
        yield place, lambda number: {"any": [number]}
    elif kind not in _NO_NUMBERS and origin is not Literal:
        raise TypeError(f"{place}: {kind!r}: say here whether it holds numbers")


_NO_NUMBERS: Final = (str, bool, NoneType, None, Never, NamedTool, AllowedTools)


def _around(below: Iterator[tuple[str, Fill]], wrap: Fill) -> Iterator[tuple[str, Fill]]:
    for place, fill in below:
        yield place, lambda number, fill=fill: wrap(fill(number))  # type: ignore[misc]


def wire_fields(kind: Descriptor, path: Path = ()) -> Iterator[Path]:
    """Yield the path to each numeric field of a message, once through a message that has itself in it."""
    for field in kind.fields:
        if field.message_type is not None:
            if field.message_type not in [each.containing_type for each in path]:
                yield from wire_fields(field.message_type, (*path, field))
        elif field.type not in _NO_NUMBER_TYPES:
            yield (*path, field)


_NO_NUMBER_TYPES: Final = (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES, FieldDescriptor.TYPE_BOOL)


def on_the_wire(path: Path, number: float) -> bytes | None:
    """Return the bytes that put a number at a path of a message; None where the type cannot hold it."""
    *outside, field = path
    made = _encoded(field, number)
    for each in reversed(outside):
        if made is not None:
            made = _varint(each.number << 3 | 2) + _varint(len(made)) + made
    return made


def _encoded(field: FieldDescriptor, number: float) -> bytes | None:
    form = _FIXED.get(field.type)
    if form is None:
        whole = isinstance(number, int) and -(2**63) <= number < 2**64
        return _varint(field.number << 3) + _varint(int(number) % 2**64) if whole else None
    try:
        value = struct.pack(form, number if form[1] in "fd" else int(number))
    except (OverflowError, ValueError, struct.error):
        return None
    return _varint(field.number << 3 | (1 if len(value) == 8 else 5)) + value


def _varint(number: int) -> bytes:
    made = bytearray()
    while number > 0x7F:
        made.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*made, number])


_FIXED: Final[Mapping[int, str]] = {
    FieldDescriptor.TYPE_FLOAT: "<f",
    FieldDescriptor.TYPE_DOUBLE: "<d",
    FieldDescriptor.TYPE_FIXED32: "<I",
    FieldDescriptor.TYPE_FIXED64: "<Q",
    FieldDescriptor.TYPE_SFIXED32: "<i",
    FieldDescriptor.TYPE_SFIXED64: "<q",
}
