"""Values that a call's own form writes otherwise than JSON does, and what a tool's schema says they are."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from typing import Any, Final

WORDS: Final[Mapping[str, Any]] = {"true": True, "false": False, "null": None, "none": None}
MAX_LITERAL: Final = 64 * 1024
"""Characters of a literal that Python's parser is asked about."""
MAX_DEPTH: Final = 64
"""Of brackets in a value."""
PARSING: Final = (ValueError, SyntaxError, TypeError, RecursionError, MemoryError)
"""What Python's parser raises at text that it does not take."""


def types_of(schema: Any) -> frozenset[str]:
    """Return the JSON types that a schema names, in `type`, `const`, `enum` and alternatives; may be none."""
    if not isinstance(schema, Mapping):
        return frozenset()
    said = schema.get("type", ())
    types = {said} if isinstance(said, str) else {each for each in said if isinstance(each, str)}
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
        return json.loads(text, parse_constant=_no_constant)
    except ValueError:
        pass
    if len(text) > MAX_LITERAL:
        raise ValueError("too long")
    return plain(ast.parse(text, mode="eval").body)


def plain(node: ast.expr) -> Any:
    """Return the value of a Python literal that JSON has too; true, false and null are words of it as well.

    Raises:
        ValueError: it is none.
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
