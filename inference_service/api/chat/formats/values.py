"""Arguments of calls: values that a format writes otherwise than as JSON, and what schemas say of them."""

import ast
import json
from collections.abc import Mapping
from typing import Any, Final

WORDS: Final[Mapping[str, Any]] = {"true": True, "false": False, "null": None, "none": None}
MAX_LITERAL: Final = 64 * 1024
"""Characters of a literal that Python's parser is asked about."""
MAX_DEPTH: Final = 64
"""Most nested brackets in a value."""
PARSING: Final = (ValueError, SyntaxError, TypeError, RecursionError, MemoryError)
"""Exceptions of Python's parser at text that it refuses."""


def types_of(schema: Any) -> frozenset[str]:
    """Return the JSON types that a schema names, in `type`, `const`, `enum` and alternatives; may be none."""
    if not isinstance(schema, Mapping):
        return frozenset()
    declared = schema.get("type", ())
    types = {declared} if isinstance(declared, str) else {each for each in declared if isinstance(each, str)}
    values = schema.get("enum", [schema["const"]] if "const" in schema else ())
    if not types and isinstance(values, list):
        types |= {type_of(value) for value in values}
    for word in ("anyOf", "oneOf"):
        for each in schema.get(word, ()) if isinstance(schema.get(word), list) else ():
            types |= types_of(each)
    return frozenset(types)


def type_of(value: Any) -> str:
    """Return the JSON type of a value."""
    match value:
        case None:
            return "null"
        case bool():
            return "boolean"
        case int():
            return "integer"
        case float():
            return "number"
        case str():
            return "string"
        case list():
            return "array"
    return "object"


def is_text(schema: Any) -> bool:
    """True where a value is text, whatever it looks like: its schema says so, or there is none."""
    types = types_of(schema)
    return not schema or types == {"string"}


def typed(text: str, schema: Any) -> Any:
    """Return what a text says as a value of a schema: a string only where nothing else fits.

    Numbers and the like are written as JSON or as Python has them: templates write both.
    """
    types = types_of(schema)
    if is_text(schema):
        return text
    try:
        value = literal(text.strip())
    except PARSING:
        return text
    if types and type_of(value) not in types and not (type_of(value) == "integer" and "number" in types):
        whole = isinstance(value, float) and value.is_integer() and "integer" in types
        return int(value) if whole else text if "string" in types else value
    return value


def literal(text: str) -> Any:
    """Return what JSON or a Python literal says.

    Raises:
        ValueError: it is neither, or holds what JSON has not.
        SyntaxError: as above.
        RecursionError: it is too deep.
    """
    word = text.lower()
    if word in WORDS:
        return WORDS[word]
    try:
        return json.loads(text, parse_constant=_no_constant)  # noqa: TID251 - an answer, as long as its tokens
    except ValueError:
        pass
    if len(text) > MAX_LITERAL:
        raise ValueError("too long")
    return plain(ast.parse(text, mode="eval").body)


def plain(node: ast.expr) -> Any:
    """Return the value of a Python literal that JSON has too; true, false and null are words of it as well.
    Raise ValueError for other texts.
    """
    match node:
        case ast.Constant(value=str() | int() | float() | None as value):
            json.dumps(value, allow_nan=False)
            return value
        case ast.Name(id=word) if word in WORDS:
            return WORDS[word]
        case ast.UnaryOp(
            op=ast.USub() | ast.UAdd() as sign, operand=ast.Constant(value=int() | float() as value)
        ):
            return -value if isinstance(sign, ast.USub) else value
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [plain(each) for each in items]
        case ast.Dict(keys=keys, values=values):
            return {_key(key): plain(value) for key, value in zip(keys, values, strict=True)}
    raise ValueError("no literal")


def _key(node: ast.expr | None) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    raise ValueError("no name")


def _no_constant(word: str) -> None:
    raise ValueError(word)


def written(value: Any) -> str:
    """Return a value as JSON."""
    return json.dumps(value, ensure_ascii=False)


SAID_ABOUT: Final = frozenset(
    {"type", "description", "title", "default", "examples", "deprecated", "readOnly", "writeOnly", "$comment"}
)
"""Keywords that ask nothing of a text but that it is one."""


class SchemaUnsupportedError(Exception):
    """A schema asks for what a form cannot hold a model to; the message names it."""


def is_open(schema: Mapping[str, Any]) -> bool:
    """True where a schema does not say which arguments there are."""
    return "properties" not in schema and schema.get("additionalProperties") is not False


def _properties(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    found = schema.get("properties")
    return found if isinstance(found, Mapping) else {}


def arguments(schema: Mapping[str, Any]) -> list[tuple[str, Any, bool]]:
    """Return the arguments that a schema names, each with whether it must be there; others there are none.
    Raise SchemaUnsupportedError where more is asked of them together.
    """
    if asks_more(schema, {"properties", "required", "additionalProperties", "$defs", "definitions", "$schema"}):
        raise SchemaUnsupportedError(f"arguments of {excerpt(schema)}")
    needed = schema.get("required")
    required = set(needed) if isinstance(needed, list) else set()
    if not required <= _properties(schema).keys():
        raise SchemaUnsupportedError("required arguments that properties does not have")
    return [(name, own, name in required) for name, own in _properties(schema).items()]


def asks_more(schema: Any, known: set[str]) -> bool:
    """True where a schema has keywords beside the known ones that a value must keep to."""
    return not isinstance(schema, Mapping) or bool(schema.keys() - SAID_ABOUT - known)


def texts(schema: Any) -> list[str] | None:
    """Return which texts a value may be, none for any; None where it is no text that stands as it is. Raise
    SchemaUnsupportedError for a text of which more is asked.
    """
    if not schema:
        return []
    if "string" not in types_of(schema):
        return None
    if isinstance(schema, Mapping) and types_of(schema) == {"string"}:
        values = schema.get("enum", [schema["const"]] if "const" in schema else [])
        if not asks_more(schema, {"enum", "const"}) and all(isinstance(value, str) for value in values):
            if any("\n" in value or "<" in value for value in values):
                raise SchemaUnsupportedError("a text with a line break or <")
            return list(values)
    if _is_any_text(schema):
        return []
    raise SchemaUnsupportedError(f"a text of {excerpt(schema)}")


def excerpt(schema: Any) -> str:
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
