"""Counts in constraints: how often parts of patterns and grammars repeat, before a library unfolds them."""

import json
import re
from collections.abc import Iterator
from typing import Any, Final

from loramux_shared.untrusted_json import parse_json

MOST: Final = 100_000
"""Repeats of one part, nested ones multiplied; more than any answer has."""
MOST_UP_TO: Final = 2**31 - 1
"""Upper bounds of a schema cost nothing, and generators write this one for "any"."""
REPEATS: Final = f"at most {MOST} repeats"
_AT_LEAST: Final = ("minLength", "minItems", "minProperties", "minContains")
_UP_TO: Final = ("maxLength", "maxItems", "maxProperties", "maxContains")
_OF_NAMES: Final = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
"""Keywords whose values hold schemas by names."""
_DATA: Final = ("enum", "const", "default", "example", "examples")
"""Keywords whose values are no schemas."""
_COUNT: Final = re.compile(r"\{\s*([0-9]*)\s*(?:,\s*([0-9]*)\s*)?\}")
_TILDE: Final = re.compile(r"~\s*([0-9]+)(?:\s*\.\.\s*([0-9]+))?")
_JSON: Final = re.compile(r"%json\s*")
_OF_SYNTAX: Final = re.compile(r"\\[pPxuU]\{[^}]*\}|\\.|[^\\]", re.DOTALL)


def too_many(kind: str, text: str) -> str | None:
    """Return the count of a constraint that is above the bound, with its place; None where there is none."""
    match kind:
        case "regex":
            return _in_regex(text)
        case "json_schema":
            return next(_in_schema(parse_json(text)), None)
        case "lark" | "gbnf":
            return next(_in_grammar(text), None)
    return None


def _in_schema(schema: Any) -> Iterator[str]:
    """Look at every schema in a schema, whose properties may be called as keywords are."""
    left = [schema]
    while left:
        value = left.pop()
        if isinstance(value, list):
            left += value
        if not isinstance(value, dict):
            continue
        for key, part in value.items():
            if key in _OF_NAMES and isinstance(part, dict):
                left += part.values()
            elif key not in _DATA:
                left.append(part)
        for key in (*_AT_LEAST, *_UP_TO):
            most, count = MOST if key in _AT_LEAST else MOST_UP_TO, value.get(key)
            if isinstance(count, int | float) and count > most:
                yield f"{key}: {count:.12g}, more than {most}"
        patterns = [value.get("pattern"), *_keys(value.get("patternProperties"))]
        yield from (found for each in patterns if isinstance(each, str) and (found := _in_regex(each)))


def _keys(value: Any) -> list[Any]:
    return list(value) if isinstance(value, dict) else []


def _in_regex(pattern: str) -> str | None:
    """Add up what a pattern unfolds to: parts beside each other are added, nested counts are multiplied."""
    sums, last, at = [0], 0, 0
    while at < len(pattern):
        char = pattern[at]
        if char == "{" and (count := _COUNT.match(pattern, at)) and (times := _times(count)):
            sums[-1] += last * (times - 1)
            last, at = last * times, count.end()
            if sums[-1] > MOST:
                return f"{count[0]} in {_excerpt(pattern)}, which is {sums[-1]} characters or more"
            continue
        if char == "(":
            sums.append(0)
            at += 1
            continue
        if char == ")" and len(sums) > 1:
            last = sums.pop()
            sums[-1] += last
            at += 1
            continue
        at = _after_class(pattern, at) if char == "[" else _after(pattern, at)
        if char not in "*+?|":
            last = 1
            sums[-1] += 1
    return None


def _times(count: re.Match[str]) -> int:
    return max((int(part[:20]) for part in count.groups() if part), default=0)


def _after(pattern: str, at: int) -> int:
    found = _OF_SYNTAX.match(pattern, at)
    return found.end() if found else at + 1


def _after_class(pattern: str, at: int) -> int:
    """Return where a class of characters ends; one in it may be a class itself."""
    depth = 0
    while at < len(pattern):
        depth += {"[": 1, "]": -1}.get(pattern[at], 0)
        if pattern[at] == "[" and pattern[at + 1 : at + 2] in ("]", "^"):  # []a] and [^]a] hold a bracket
            at += 1 + (pattern[at + 1] == "^" and pattern[at + 2 : at + 3] == "]")
        at = _after(pattern, at)
        if not depth:
            break
    return at


def _in_grammar(text: str) -> Iterator[str]:
    """Look at what stands between literals, and into the patterns and schemas of a grammar."""
    at, decoder = 0, json.JSONDecoder()
    while at < len(text):
        char = text[at]
        if text.startswith("//", at) or (char == "#" and "::=" in text):
            at = _end_of_line(text, at)
        elif char in "\"'":
            at = _after_literal(text, at, char)
        elif char == "[" and "::=" in text:
            at = _after_class(text, at)
        elif char == "/" and "::=" not in text:
            end = _after_literal(text, at, "/")
            if found := _in_regex(text[at + 1 : end - 1]):
                yield found
            at = end
        elif schema := _JSON.match(text, at):
            try:
                value, at = decoder.raw_decode(text, schema.end())
            except (ValueError, RecursionError):
                return  # the library reports the error
            yield from _in_schema(value)
        elif count := _COUNT.match(text, at) or _TILDE.match(text, at):
            if _times(count) > MOST:
                yield f"{count[0]}, more than {MOST}"
            at = count.end()
        else:
            at += 1


def _end_of_line(text: str, at: int) -> int:
    end = text.find("\n", at)
    return len(text) if end < 0 else end


def _after_literal(text: str, at: int, mark: str) -> int:
    end = at + 1
    while end < len(text) and text[end] not in (mark, "\n"):
        end += 2 if text[end] == "\\" else 1
    return end + 1


def _excerpt(pattern: str) -> str:
    return pattern if len(pattern) <= 80 else f"{pattern[:77]}..."
