"""Grammars of Gemma's values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from inference_service.chat.formats import gemma
from inference_service.chat.formats.arguments import CannotSayError, arguments, asks_more, is_open, shown, texts
from inference_service.chat.formats.lark import Asked, Spelling, either, json_of, quoted, row
from inference_service.chat.formats.values import types_of

_OPEN: Final = """\
open: "{{" (open_m ("," open_m)*)? "}}"
open_m: /[a-zA-Z_][a-zA-Z0-9_.-]{{0,63}}/ ":" open_v
open_v: open_t | open_o | open | "[" (open_v ("," open_v)*)? "]"
open_t: {text}
open_o: {other}
"""
"""Any object."""


class GemmaRules:
    """Writes the rules of Gemma's values; names stand in alphabetical order, as its template has them."""

    def __init__(self, form: gemma.Form, spelling: Spelling) -> None:
        self._quote, self._spelling = form.quote, spelling
        self._ends, rule = spelling.until(form.quote, "text")
        self.shared = rule + _OPEN.format(
            text=f"{spelling(form.quote)} {self._ends}", other=json_of({"type": ["number", "boolean", "null"]})
        )
        """Rules that the others need."""

    def members(self, name: str, tool: Asked, schema: Mapping[str, Any]) -> Iterator[str]:
        """Yield the rules of an object."""
        if is_open(schema):
            yield f"{name}: open\n"
            return
        named = sorted(arguments(schema), key=lambda each: each[0].lower())
        parts = [(f"{quoted(key + ':')} {name}_v{at}", needed) for at, (key, _, needed) in enumerate(named)]
        yield f'{name}: "{{" {name}_m "}}"\n'
        yield row(f"{name}_m", parts, ",")
        for at, (_, own, _) in enumerate(named):
            yield from self.value(f"{name}_v{at}", tool, own)

    def value(self, name: str, tool: Asked, schema: Any) -> Iterator[str]:
        """Yield the rules of a value."""
        types, choices = types_of(schema), texts(schema)
        if choices is not None:
            told = [self._spelling(self._quote + choice + self._quote) for choice in choices]
            yield either(told or [f"{self._spelling(self._quote)} {self._ends}"], name)
        elif types and types <= {"integer", "number", "boolean", "null"}:
            yield f"{name}: {tool.leaf(schema)}\n"
        elif types == {"object"} and not asks_more(schema, {"properties", "required", "additionalProperties"}):
            yield from self.members(name, tool, schema)
        elif types == {"array"} and not asks_more(schema, {"items"}) and "items" in schema:
            yield f'{name}: "[" ({name}_i ("," {name}_i)*)? "]"\n'
            yield from self.value(f"{name}_i", tool, schema["items"])
        else:
            raise CannotSayError(f"a value of {shown(schema)}")
