"""Grammars of Gemma's values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from inference_service.openai_api.dialects import gemma
from inference_service.openai_api.dialects.arguments import (
    CannotSayError,
    arguments,
    asks_more,
    is_open,
    shown,
    texts,
)
from inference_service.openai_api.dialects.lark import ANYTHING, Asked, Spelling, either, quoted, row
from inference_service.openai_api.dialects.values import types_of


class GemmaRules:
    """Writes the rules of Gemma's values; names stand in alphabetical order, as its template has them."""

    def __init__(self, form: gemma.Form, spelling: Spelling) -> None:
        self._quote, self._spelling = form.quote, spelling
        self._ends, self.text = spelling.until(form.quote, "text")

    def members(self, name: str, tool: Asked, schema: Mapping[str, Any]) -> Iterator[str]:
        """Yield the rules of an object."""
        if is_open(schema):
            if not self._spelling.is_special(self._quote):
                raise CannotSayError("arguments that are not named")
            yield f'{name}: "{{" {name}_o ({self._spelling(self._quote)} {name}_o)*\n{name}_o: {ANYTHING}\n'
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
