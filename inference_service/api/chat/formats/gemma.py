"""Gemma's own form of calls: names without quotes, and strings between a mark that they cannot hold.

::

    <|tool_call>call:weather{city:<|"|>Oslo<|"|>,days:3}<tool_call|>                       Gemma 4
    <start_function_call>call:weather{city:<escape>Oslo<escape>}<end_function_call>        FunctionGemma

Each argument is emitted when it is whole, a string as it is generated.
Source: chat templates of gemma-4-31B-it and functiongemma-270m-it.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from inference_service.api.chat.formats.lark import (
    MOST_CALLS,
    CallGrammar,
    OfferedTool,
    Spelling,
    either,
    json_of,
    quoted,
    row,
)
from inference_service.api.chat.formats.reading import (
    AnswerSource,
    Block,
    Reader,
    TemplateMarks,
    ToolFormat,
    marks,
)
from inference_service.api.chat.formats.values import (
    MAX_DEPTH,
    PARSING,
    SchemaUnsupportedError,
    arguments,
    asks_more,
    excerpt,
    is_open,
    literal,
    texts,
    types_of,
    written,
)
from inference_service.api.chat.request import AnswerCalls
from loramux_shared.runtime import ToolParser


@dataclass(frozen=True)
class GemmaMarks:
    """The marks of one of the two."""

    begin: str
    end: str
    quote: str


MARKS: Final = GemmaMarks("<|tool_call>", "<tool_call|>", '<|"|>')
FUNCTION_MARKS: Final = GemmaMarks("<start_function_call>", "<end_function_call>", "<escape>")
_KEY: Final = re.compile(r"[^:,{}\[\]<>]{1,256}")
_BARE: Final = re.compile(r"[^,{}\[\]<]{1,256}")
_NEXT: Final = re.compile(r"\s{0,100}(,?)\s{0,100}")
_NOTHING: Final = object()
"""No value."""
_OPEN: Final = """\
open: "{{" (open_m ("," open_m)*)? "}}"
open_m: /[a-zA-Z_][a-zA-Z0-9_.-]{{0,63}}/ ":" open_v
open_v: open_t | open_o | open | "[" (open_v ("," open_v)*)? "]"
open_t: {text}
open_o: {other}
"""
"""Any object."""


def gemma_blocks(calls: AnswerCalls) -> Mapping[str, Block]:
    """Return the reader of Gemma 4's calls."""
    return {MARKS.begin: _block(calls, MARKS)}


def function_blocks(calls: AnswerCalls) -> Mapping[str, Block]:
    """Return the reader of FunctionGemma's calls."""
    return {FUNCTION_MARKS.begin: _block(calls, FUNCTION_MARKS)}


def _block(calls: AnswerCalls, form: GemmaMarks) -> Block:
    def read(source: AnswerSource) -> Reader[bool]:
        yield from source.spaces()
        if not (yield from source.literal("call:")):
            return False
        name = (yield from source.upto("{")) or ""
        if (name := name.strip()) not in calls.offered:
            return False
        yield calls.begin(name)
        yield from _arguments(source, calls, form)
        yield from source.spaces()
        yield from source.literal(form.end)
        return True

    return read


def _arguments(source: AnswerSource, calls: AnswerCalls, form: GemmaMarks) -> Reader[None]:
    """Tell the arguments behind the brace; what is no argument is left."""
    opened = False
    while True:
        key = yield from _key(source, form)
        if key is None:
            break
        yield calls.more(f"{', ' if opened else '{'}{written(key)}: ")
        opened = True
        if (yield from source.literal(form.quote)):
            yield calls.more('"')
            if not (yield from _string(source, calls, form)):
                return
            yield calls.more('"')
        else:
            value = yield from _value(source, form, 0)
            if value is _NOTHING:
                if source.ended:
                    return
                value = None
            yield calls.more(written(value))
        comma = yield from source.match(_NEXT)
        if comma is None or not comma[1]:
            break
    closed = yield from source.literal("}")
    if closed or not source.ended:
        yield calls.more("}" if opened else "{}")


def _key(source: AnswerSource, form: GemmaMarks) -> Reader[str | None]:
    """Return a name with its colon read; it may stand between quotes."""
    yield from source.spaces()
    if (yield from source.literal(form.quote)):
        name = yield from _whole_string(source, form)
    else:
        found = yield from source.match(_KEY)
        name = found[0].strip() if found else None
    yield from source.spaces()
    if name is None or not (yield from source.literal(":")):
        return None
    yield from source.spaces()
    return name


def _string(source: AnswerSource, calls: AnswerCalls, form: GemmaMarks) -> Reader[bool]:
    """Tell a string to its quote; say whether that came."""
    known = marks(form.quote)
    while True:
        found = known.find(source)
        if part := source.take(found.start() if found else known.certain(source)):
            yield calls.more(written(part)[1:-1])
        if found:
            source.at = found.end()
            return True
        if source.ended:
            return False
        source.forget()
        yield None


def _whole_string(source: AnswerSource, form: GemmaMarks) -> Reader[str | None]:
    known = marks(form.quote)
    begin = source.at
    while True:
        found = known.find(source)
        if found:
            source.at = found.end()
            return source.text[begin : found.start()]
        if source.ended:
            return None
        source.at = known.certain(source)
        yield None


def _value(source: AnswerSource, form: GemmaMarks, depth: int) -> Reader[Any]:
    """Return a value when it is whole, or that there is none."""
    if (yield from source.literal(form.quote)):
        text = yield from _whole_string(source, form)
        return _NOTHING if text is None else text
    if depth > MAX_DEPTH:
        return _NOTHING
    if (yield from source.literal("[")):
        return (yield from _items(source, form, depth))
    if (yield from source.literal("{")):
        return (yield from _members(source, form, depth))
    found = yield from source.match(_BARE)
    if found is None or (source.ended and not source.left):
        return _NOTHING
    try:
        return literal(found[0].strip())
    except PARSING:
        return found[0].strip()


def _items(source: AnswerSource, form: GemmaMarks, depth: int) -> Reader[Any]:
    items: list[Any] = []
    while True:
        yield from source.spaces()
        if (yield from source.literal("]")):
            return items
        value = yield from _value(source, form, depth + 1)
        if value is _NOTHING:
            return _NOTHING
        items.append(value)
        yield from source.match(_NEXT)


def _members(source: AnswerSource, form: GemmaMarks, depth: int) -> Reader[Any]:
    members: dict[str, Any] = {}
    while True:
        yield from source.spaces()
        if (yield from source.literal("}")):
            return members
        key = yield from _key(source, form)
        if key is None:
            return _NOTHING
        value = yield from _value(source, form, depth + 1)
        if value is _NOTHING:
            return _NOTHING
        members[key] = value
        yield from source.match(_NEXT)


def _gemma(form: GemmaMarks) -> Callable[[Sequence[OfferedTool], Spelling, bool], CallGrammar]:
    def make(tools: Sequence[OfferedTool], spelling: Spelling, several: bool) -> CallGrammar:
        writer = _Rules(form, spelling)
        names = [f"{quoted(f'call:{tool.name}')} a{at}" for at, tool in enumerate(tools)]
        rules = [f"call: one {spelling(form.end)}\n", either(names, "one")]
        for at, tool in enumerate(tools):
            rules += writer.members(f"a{at}", tool, tool.schema)
        return CallGrammar(form.begin, "".join((*rules, writer.shared)), MOST_CALLS if several else 1)

    return make


class _Rules:
    """Writes the rules of Gemma's values; names stand in alphabetical order, as its template has them."""

    def __init__(self, form: GemmaMarks, spelling: Spelling) -> None:
        self._quote, self._spelling = form.quote, spelling
        self._ends, rule = spelling.until(form.quote, "text")
        self.shared = rule + _OPEN.format(
            text=f"{spelling(form.quote)} {self._ends}", other=json_of({"type": ["number", "boolean", "null"]})
        )
        """Rules that the others need."""

    def members(self, name: str, tool: OfferedTool, schema: Mapping[str, Any]) -> Iterator[str]:
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

    def value(self, name: str, tool: OfferedTool, schema: Any) -> Iterator[str]:
        """Yield the rules of a value."""
        types, choices = types_of(schema), texts(schema)
        if choices is not None:
            spelled = [self._spelling(self._quote + choice + self._quote) for choice in choices]
            yield either(spelled or [f"{self._spelling(self._quote)} {self._ends}"], name)
        elif types and types <= {"integer", "number", "boolean", "null"}:
            yield f"{name}: {tool.leaf(schema)}\n"
        elif types == {"object"} and not asks_more(schema, {"properties", "required", "additionalProperties"}):
            yield from self.members(name, tool, schema)
        elif types == {"array"} and not asks_more(schema, {"items"}) and "items" in schema:
            yield f'{name}: "[" ({name}_i ("," {name}_i)*)? "]"\n'
            yield from self.value(f"{name}_i", tool, schema["items"])
        else:
            raise SchemaUnsupportedError(f"a value of {excerpt(schema)}")


def _format(
    parser: ToolParser, mark: str, own: GemmaMarks, blocks: Callable[[AnswerCalls], Mapping[str, Block]]
) -> ToolFormat:
    tokens = (own.begin, own.end, own.quote)
    return ToolFormat(parser, (TemplateMarks((mark,)),), blocks, _gemma(own), tokens=tokens, end=own.end)


GEMMA4: Final = _format(ToolParser.GEMMA4, "<|tool_call>", MARKS, gemma_blocks)
FUNCTIONGEMMA: Final = _format(
    ToolParser.FUNCTIONGEMMA, "<start_function_call>", FUNCTION_MARKS, function_blocks
)
