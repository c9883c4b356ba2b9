"""Gemma's own form of calls: names without quotes, and strings between a mark that they cannot hold.

::

    <|tool_call>call:weather{city:<|"|>Oslo<|"|>,days:3}<tool_call|>                       Gemma 4
    <start_function_call>call:weather{city:<escape>Oslo<escape>}<end_function_call>        FunctionGemma

Each argument is told when it is whole, a string as it comes.
Source: chat templates of gemma-4-31B-it and functiongemma-270m-it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from inference_service.chat.formats.calls import Calls
from inference_service.chat.formats.frame import Block
from inference_service.chat.formats.source import Reader, Source, marks
from inference_service.chat.formats.values import MAX_DEPTH, PARSING, literal, written


@dataclass(frozen=True)
class Form:
    """The marks of one of the two."""

    begin: str
    end: str
    quote: str


GEMMA: Final = Form("<|tool_call>", "<tool_call|>", '<|"|>')
FUNCTION: Final = Form("<start_function_call>", "<end_function_call>", "<escape>")
_KEY: Final = re.compile(r"[^:,{}\[\]<>]{1,256}")
_BARE: Final = re.compile(r"[^,{}\[\]<]{1,256}")
_NEXT: Final = re.compile(r"\s{0,100}(,?)\s{0,100}")
_NOTHING: Final = object()
"""No value."""


def gemma_blocks(calls: Calls) -> Mapping[str, Block]:
    """Return the reader of Gemma 4's calls."""
    return {GEMMA.begin: _block(calls, GEMMA)}


def function_blocks(calls: Calls) -> Mapping[str, Block]:
    """Return the reader of FunctionGemma's calls."""
    return {FUNCTION.begin: _block(calls, FUNCTION)}


def _block(calls: Calls, form: Form) -> Block:
    def read(source: Source) -> Reader[bool]:
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


def _arguments(source: Source, calls: Calls, form: Form) -> Reader[None]:
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


def _key(source: Source, form: Form) -> Reader[str | None]:
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


def _string(source: Source, calls: Calls, form: Form) -> Reader[bool]:
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


def _whole_string(source: Source, form: Form) -> Reader[str | None]:
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


def _value(source: Source, form: Form, depth: int) -> Reader[Any]:
    """Return a value when it is whole, or that there is none."""
    if (yield from source.literal(form.quote)):
        said = yield from _whole_string(source, form)
        return _NOTHING if said is None else said
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


def _items(source: Source, form: Form, depth: int) -> Reader[Any]:
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


def _members(source: Source, form: Form, depth: int) -> Reader[Any]:
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
