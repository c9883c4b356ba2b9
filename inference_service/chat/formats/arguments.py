"""Arguments as schemas describe them, for forms that write values otherwise than as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from inference_service.chat.formats.values import types_of

SAID_ABOUT: Final = frozenset(
    {"type", "description", "title", "default", "examples", "deprecated", "readOnly", "writeOnly", "$comment"}
)
"""Keywords that ask nothing of a text but that it is one."""


class CannotSayError(Exception):
    """A schema asks for what a form cannot hold a model to; the message names it."""


def is_open(schema: Mapping[str, Any]) -> bool:
    """True where a schema does not say which arguments there are."""
    return "properties" not in schema and schema.get("additionalProperties") is not False


def _properties(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    found = schema.get("properties")
    return found if isinstance(found, Mapping) else {}


def arguments(schema: Mapping[str, Any]) -> list[tuple[str, Any, bool]]:
    """Return the arguments that a schema names, each with whether it must be there; others there are none.

    Raises:
        CannotSayError: it asks for more of them together.
    """
    if asks_more(schema, {"properties", "required", "additionalProperties", "$defs", "definitions", "$schema"}):
        raise CannotSayError(f"arguments of {shown(schema)}")
    needed = schema.get("required")
    required = set(needed) if isinstance(needed, list) else set()
    if not required <= _properties(schema).keys():
        raise CannotSayError("required arguments that properties does not have")
    return [(name, own, name in required) for name, own in _properties(schema).items()]


def asks_more(schema: Any, known: set[str]) -> bool:
    """True where a schema has keywords beside the known ones that a value must keep to."""
    return not isinstance(schema, Mapping) or bool(schema.keys() - SAID_ABOUT - known)


def texts(schema: Any) -> list[str] | None:
    """Return which texts a value may be, none for any; None where it is no text that stands as it is.

    Raises:
        CannotSayError: it is a text of which more is asked.
    """
    if not schema:
        return []
    if "string" not in types_of(schema):
        return None
    if isinstance(schema, Mapping) and types_of(schema) == {"string"}:
        values = schema.get("enum", [schema["const"]] if "const" in schema else [])
        if not asks_more(schema, {"enum", "const"}) and all(isinstance(value, str) for value in values):
            if any("\n" in value or "<" in value for value in values):
                raise CannotSayError("a text with a line break or <")
            return list(values)
    if _is_any_text(schema):
        return []
    raise CannotSayError(f"a text of {shown(schema)}")


def shown(schema: Any) -> str:
    """Return a schema as an error shows it."""
    return json.dumps(schema, ensure_ascii=False)[:200]


def _is_any_text(schema: Any) -> bool:
    """True where any text is a value: of alternatives, one takes all texts, and the others are mere types."""
    if not isinstance(schema, Mapping):
        return False
    choices = schema.get("anyOf", schema.get("oneOf"))
    if isinstance(choices, list):
        return not asks_more(schema, {"anyOf", "oneOf"}) and all(map(_is_a_type, choices))
    return _is_a_type(schema)


def _is_a_type(schema: Any) -> bool:
    return isinstance(schema, Mapping) and "type" in schema and not asks_more(schema, set())
