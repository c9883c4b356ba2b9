"""Fields of a message from a caller's values, and the faults of values that do not fit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from loramux_shared.faults import Finding

SHOWN: Final = 80
"""Characters of a value that a finding shows."""
_WHOLE: Final = "a whole number from {} to {}"
_EXPECTED: Final = {
    FieldDescriptor.TYPE_BOOL: "True or False",
    FieldDescriptor.TYPE_FLOAT: "a number",
    FieldDescriptor.TYPE_DOUBLE: "a number",
    FieldDescriptor.TYPE_STRING: "text",
    FieldDescriptor.TYPE_INT32: _WHOLE.format(-(2**31), 2**31 - 1),
    FieldDescriptor.TYPE_INT64: _WHOLE.format(-(2**63), 2**63 - 1),
    FieldDescriptor.TYPE_UINT32: _WHOLE.format(0, 2**32 - 1),
    FieldDescriptor.TYPE_UINT64: _WHOLE.format(0, 2**64 - 1),
}


def misfits(kind: type[Message], fields: Mapping[str, Any]) -> list[Finding]:
    """Return a finding for each value that does not fit its field of a message."""
    found = []
    for name, value in fields.items():
        try:
            kind(**{name: value})
        except (ValueError, TypeError):
            found.append(misfit(name, _expected(kind, name), repr(value)))
    return found


def misfit(where: str, expected: str, found: str) -> Finding:
    """Return the finding of a value that does not fit."""
    return Finding(code="E_BAD_FIELD", where=where, expected=expected, found=found[:SHOWN])


def _expected(kind: type[Message], name: str) -> str:
    """Return what a field takes, in a caller's words."""
    field = kind.DESCRIPTOR.fields_by_name[name]
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        key, value = (_EXPECTED.get(each.type, each.name) for each in field.message_type.fields)
        return f"a mapping, each key {key}, each value {value}"
    one = _EXPECTED.get(field.type, name)
    return f"a list, each {one}" if field.is_repeated else one
