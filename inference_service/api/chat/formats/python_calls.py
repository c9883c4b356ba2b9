"""Calls as Python writes them: of Llama 3 and 4, OLMo 3 and Gemma 3.

::

    [weather(city="Oslo"), news()]

OLMo 3 writes them line by line between tags, and Gemma 3, as its guide asks it to, in a fence::

    <function_calls>
    weather(city="Oslo")
    news()
    </function_calls>

    ```tool_code
    weather(city="Oslo")
    ```

Source: chat templates of Llama-3.2-3B-Instruct and Olmo-3-7B-Instruct, and
https://ai.google.dev/gemma/docs/capabilities/function-calling.
"""

import ast
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from inference_service.api.chat.formats.json_formats import PYTHON_TAG
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
from inference_service.api.chat.formats.reading import AnswerSource, Block, Reader, TemplateMarks, ToolFormat
from inference_service.api.chat.formats.values import (
    MAX_DEPTH,
    MAX_LITERAL,
    PARSING,
    arguments,
    is_open,
    plain,
    written,
)
from inference_service.api.chat.request import AnswerCalls
from loramux_shared.runtime import ToolParser

OLMO: Final = "<function_calls>"
OLMO_END: Final = "</function_calls>"
FENCE: Final = "```tool_code\n"
FENCE_END: Final = "```"
_NAME: Final = re.compile(r"[A-Za-z_][\w.\-]{0,63}")
_STEP: Final = re.compile(r"""["'()\[\]{}]""")
_QUOTE: Final = {quote: re.compile(rf"[\\{quote}]") for quote in "\"'"}


def pythonic_leading(calls: AnswerCalls) -> Block:
    """Return the reader of a list of calls as Python has them."""

    def read(source: AnswerSource) -> Reader[bool]:
        if not (yield from source.literal("[")):
            return False
        called = yield from python_calls(source, calls)
        if called:
            yield from source.spaces()
            yield from source.literal("]")
        return called

    return read


def pythonic_blocks(calls: AnswerCalls) -> Mapping[str, Block]:
    """Return the reader of the same behind the tag, as some finetunes have it."""
    read = pythonic_leading(calls)

    def tagged(source: AnswerSource) -> Reader[bool]:
        yield from source.spaces()
        return (yield from read(source))

    return {PYTHON_TAG: tagged}


def olmo_blocks(calls: AnswerCalls) -> Mapping[str, Block]:
    """Return the reader of lines of calls between tags."""
    return {OLMO: _lines(calls, OLMO_END)}


def fenced_blocks(calls: AnswerCalls) -> Mapping[str, Block]:
    """Return the reader of lines of calls in a fence."""
    return {FENCE: _lines(calls, FENCE_END)}


def _lines(calls: AnswerCalls, end: str) -> Block:
    def read(source: AnswerSource) -> Reader[bool]:
        if not (yield from python_calls(source, calls)):
            return False
        yield from source.spaces()
        yield from source.literal(end)
        return True

    return read


def python_calls(source: AnswerSource, calls: AnswerCalls) -> Reader[bool]:
    """Read calls with spaces and commas between; say whether there were any.

    Each is emitted when it is whole: not before that is it known to be one.
    """
    called = False
    while True:
        before = source.at
        yield from source.spaces()
        if called and (yield from source.literal(",")):
            yield from source.spaces()
        call = yield from _python_call(source)
        if call is None or call[0] not in calls.offered:
            source.at = before
            return called
        yield calls.begin(call[0])
        yield calls.more(written(call[1]))
        called = True


def _python_call(source: AnswerSource) -> Reader[tuple[str, dict[str, Any]] | None]:
    """Return the name and the arguments of a call; None where there is none."""
    begin = source.at
    name = yield from source.match(_NAME)
    if name is None or not (yield from source.literal("(")) or not (yield from _brackets(source, begin)):
        return None
    try:
        call = ast.parse(f"f{source.text[name.end() : source.at]}", mode="eval").body
        if not isinstance(call, ast.Call) or call.args:
            return None
        arguments = {word.arg: plain(word.value) for word in call.keywords if word.arg is not None}
    except PARSING:
        return None
    return (name[0], arguments) if len(arguments) == len(call.keywords) else None


def _brackets(source: AnswerSource, begin: int) -> Reader[bool]:
    """Read to the bracket that closes the one before; say whether that came within bounds."""
    depth, quote, place = 1, "", source.at
    while depth:
        found = yield from source.search(_QUOTE[quote] if quote else _STEP, place, begin + MAX_LITERAL)
        if found is None:
            return False
        place = found.end()
        match found[0]:
            case "\\":
                place += 1
            case '"' | "'":
                quote = "" if quote else found[0]
            case "(" | "[" | "{":
                depth += 1
            case _:
                depth -= 1
        if depth > MAX_DEPTH or place - begin > MAX_LITERAL:
            return False
    source.at = place
    return True


def _pythonic(tools: Sequence[OfferedTool], spelling: Spelling, several: bool) -> CallGrammar:
    del spelling
    more = f'(", " one){{0,{MOST_CALLS - 1}}}' if several else ""
    return CallGrammar("", f'call: "[" one {more} "]"\n{_python(tools)}')


def _olmo(tools: Sequence[OfferedTool], spelling: Spelling, several: bool) -> CallGrammar:
    more = f'("\\n" one){{0,{MOST_CALLS - 1}}}' if several else ""
    end = spelling("\n" + OLMO_END)
    return CallGrammar(OLMO, f'call: "\\n" one {more} {end}\n{_python(tools)}', narrow=True)


def _fenced(tools: Sequence[OfferedTool], spelling: Spelling, several: bool) -> CallGrammar:
    more = f'("\\n" one){{0,{MOST_CALLS - 1}}}' if several else ""
    end = spelling("\n" + FENCE_END)
    return CallGrammar(FENCE, f"call: one {more} {end}\n{_python(tools)}", narrow=True)


def _python(tools: Sequence[OfferedTool]) -> str:
    """Return the rules of one call as Python has it; its values are JSON, which is read as well."""
    rules = [either([f"{quoted(tool.name + '(')} a{at} {quoted(')')}" for at, tool in enumerate(tools)], "one")]
    for at, tool in enumerate(tools):
        if is_open(tool.schema):
            word = f"a{at}_w"
            rules.append(f'a{at}: ({word} (", " {word})*)?\n{word}: /[a-z_][a-zA-Z0-9_]*=/ {word}_v\n')
            rules.append(f"{word}_v: {json_of({})}\n")
            continue
        parts = [
            (f"{quoted(name + '=')} a{at}_v{number}", needed)
            for number, (name, _, needed) in enumerate(arguments(tool.schema))
        ]
        rules.append(row(f"a{at}", parts, ", "))
        rules += [
            f"a{at}_v{number}: {tool.leaf(schema)}\n"
            for number, (_, schema, _) in enumerate(arguments(tool.schema))
        ]
    return "".join(rules)


PYTHONIC: Final = ToolFormat(
    ToolParser.PYTHONIC,
    (TemplateMarks(("func_name1(",)),),
    pythonic_blocks,
    _pythonic,
    leading=pythonic_leading,
    tokens=(PYTHON_TAG,),
)
OLMO3: Final = ToolFormat(
    ToolParser.OLMO3, (TemplateMarks(("<function_calls>",)),), olmo_blocks, _olmo, tokens=(OLMO, OLMO_END)
)
TOOL_CODE: Final = ToolFormat(ToolParser.TOOL_CODE, (TemplateMarks(("```tool_code",)),), fenced_blocks, _fenced)
