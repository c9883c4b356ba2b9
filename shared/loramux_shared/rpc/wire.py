"""A bound on the memory of an unpacked message: two bytes on the wire can become a hundred in memory."""

from collections.abc import Callable
from typing import Any, Final

from google.protobuf.descriptor import Descriptor

from loramux_shared.faults import RequestInvalid

MAX_FIELDS: Final = 32_768
"""Fields of a request as it is sent: with those of messages inside it, and each element that is not packed."""
_VARINT, _FIXED64, _BYTES, _GROUP, _END, _FIXED32 = range(6)
_SIZES: Final = {_FIXED64: 8, _FIXED32: 4, _GROUP: 0, _END: 0}


def bounded(parse: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """Return a class's FromString that refuses a message of too many fields before it makes anything of it.

    Raises, when it is called:
        RequestInvalid: there are more.
        DecodeError: it is no such message.
    """
    descriptor: Descriptor = parse.__self__.DESCRIPTOR  # type: ignore[attr-defined]

    def parse_bounded(data: bytes) -> Any:
        if len(data) > 2 * MAX_FIELDS and more_fields(data, descriptor, MAX_FIELDS):
            raise RequestInvalid(f"the request has more than {MAX_FIELDS} fields. Send fewer.")
        return parse(data)

    return parse_bounded


def more_fields(data: bytes, descriptor: Descriptor, most: int) -> bool:
    """True when a message has more fields; where it is broken, those that can be read count."""
    found = 0
    inside = [(0, len(data), descriptor)]
    while inside:
        at, end, kind = inside.pop()
        while at < end:
            found += 1
            if found > most:
                return True
            tag, at = _varint(data, at, end)
            wire = tag & 7
            if wire == _BYTES:
                size, at = _varint(data, at, end)
                field = kind.fields_by_number.get(tag >> 3) if size else None
                if field is not None and field.message_type is not None:
                    inside.append((at, min(at + size, end), field.message_type))
                at += size
            elif wire == _VARINT:
                _, at = _varint(data, at, end)
            else:
                at += _SIZES.get(wire, end)
    return False


def _varint(data: bytes, at: int, end: int) -> tuple[int, int]:
    """Return a number and the place behind it; what ends too early ends there."""
    number = shift = 0
    while at < end:
        byte = data[at]
        at += 1
        if byte < 0x80:
            return number | byte << shift, at
        number |= (byte & 0x7F) << shift
        shift += 7
        if shift > 63:
            break
    return number, at
