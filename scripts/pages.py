"""The parts that the generators of pages share: tables, and the types of JSON schemas in words."""

from __future__ import annotations

import ast
import inspect
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

Schema: TypeAlias = Mapping[str, Any]
OBVIOUS = frozenset({"string", "path", "boolean", "list of string", "list of path"})
"""Types that a list leaves out, because the meaning tells them."""


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def replaced(text: str, name: str, between: str) -> str:
    """Return a page with something else between the marks of a name."""
    begin, end = f"<!-- {name}: `make docs` -->\n", f"<!-- end of {name} -->\n"
    before, found, rest = text.partition(begin)
    _, found_too, after = rest.partition(end)
    if not (found and found_too):
        raise ValueError(f"expected {begin.strip()} and then {end.strip()}")
    return "".join((before, begin, between, end, after))


def entry(name: str, field: Schema, owner: Schema, definitions: Mapping[str, Schema]) -> str:
    """Return the line of a list for a field: its name, type, default and meaning."""
    kind, default = type_of(field, definitions), default_of(name, field, owner)
    if default not in ("", "required"):
        default = f"default {default}"
    kind = kind.removeprefix("integer, ").removeprefix("number, ").removeprefix("string, ")
    known = "; ".join(filter(None, ("" if kind in OBVIOUS else kind, default)))
    about = one_line(field.get("description", "")).replace("``", "`")
    return f"{known and f' ({known})'}: {about}\n"


def entries_of(entries: Iterable[tuple[str, str]]) -> str:
    """Return a line per entry with a meaning, and one line for all others."""
    listed = list(entries)
    lines = [f"- {name}: {meaning}\n" for name, meaning in listed if meaning]
    plain = ", ".join(name for name, meaning in listed if not meaning)
    if plain:
        lines.append(f"- {'also ' if lines else ''}{plain}\n")
    return "".join(lines)


def fields_of(kind: type) -> list[tuple[ast.stmt, str]]:
    """Return the statements of a class, each with the string that follows it: the meaning of a field."""
    [tree] = ast.parse(inspect.cleandoc("\n" + inspect.getsource(kind))).body
    assert isinstance(tree, ast.ClassDef)  # noqa: S101 - the source of a class
    rows = []
    for each, after in zip(tree.body, [*tree.body[1:], None], strict=True):
        known = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
        rows.append((each, inspect.cleandoc(str(after.value.value)) if known else ""))  # type: ignore[union-attr]
    return rows


def one_line(text: str) -> str:
    """Return a text without its line breaks."""
    return " ".join(text.split())


def type_of(schema: Schema, definitions: Mapping[str, Schema]) -> str:
    """Return the type of a field in words: ``integer, at least 1``."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        target = definitions[name]
        return type_of(target, definitions) if "enum" in target else f"[{name}](#{name.lower()})"
    if "anyOf" in schema:
        return " or ".join(type_of(each, definitions) for each in schema["anyOf"] if each.get("type") != "null")
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if schema.get("type") == "array":
        return f"list of {type_of(schema['items'], definitions)}" if schema.get("items") else "list"
    if schema.get("type") == "object":
        inner = [*schema.get("patternProperties", {}).values(), schema.get("additionalProperties")]
        return f"mapping of names to {type_of(inner[0], definitions)}"
    return _plain(schema)


def _plain(schema: Schema) -> str:
    words = {"pattern": "matches", "minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most"}
    bounds = [f"{text} `{schema[key]}`" for key, text in words.items() if key in schema]
    if "maxLength" in schema:
        bounds.append(f"at most {schema['maxLength']} characters")
    name = "path" if schema.get("format") == "path" else schema.get("type", "any")
    return ", ".join([name, *bounds])


def default_of(name: str, schema: Schema, owner: Schema) -> str:
    """Return the default of a field, for a cell."""
    if name in owner.get("required", ()):
        return "required"
    value = schema.get("default")
    return (
        ""
        if value in (None, "", [], {}) or isinstance(value, dict)
        else f"`{json.dumps(value).strip(chr(34))}`"
    )
