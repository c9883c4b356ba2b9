"""Calls between tags, in two forms: of Hermes, Qwen 2.5 and 3, SmolLM 3, and of Qwen 3 Coder and Qwen 3.5.

::

    <tool_call>
    {"name": "weather", "arguments": {"city": "Oslo"}}
    </tool_call>

    <tool_call>
    <function=weather>
    <parameter=city>
    Oslo
    </parameter>
    </function>
    </tool_call>

Whichever a model was taught, both are read. Values of the second are what the tool's schema says: text as it
stands, which is emitted as it is generated, others as JSON or as Python writes them.
Source: https://github.com/NousResearch/Hermes-Function-Calling, and the chat templates of Qwen3-Coder-30B-A3B
and Qwen3.5-4B.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from inference_service.api.chat.formats.json_calls import json_calls
from inference_service.api.chat.formats.lark import (
    MOST_CALLS,
    CallGrammar,
    OfferedTool,
    Spelling,
    calls_schema,
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
from inference_service.api.chat.formats.values import arguments, is_open, is_text, texts, typed, written
from inference_service.api.chat.request import AnswerCalls
from loramux_shared.runtime import ToolParser

BEGIN: Final = "<tool_call>"
END: Final = "</tool_call>"
FUNCTION: Final = "<function="
_END_OF_VALUE: Final = "</parameter>"
_NEWLINE: Final = 'nl: "\\n"?\n'


def tagged_blocks(calls: AnswerCalls) -> Mapping[str, Block]:
    """Return the readers of both forms; models leave out the outer tag of the second now and then."""

    def tagged(source: AnswerSource) -> Reader[bool]:
        yield from source.spaces()
        if (yield from source.literal(FUNCTION)):
            called = yield from _function(source, calls)
        else:
            called = yield from json_calls(source, calls)
        return called and (yield from _closed(source))

    def bare(source: AnswerSource) -> Reader[bool]:
        return (yield from _function(source, calls)) and (yield from _closed(source))

    return {BEGIN: tagged, FUNCTION: bare}


def _closed(source: AnswerSource) -> Reader[bool]:
    """Read the closing tag, which may be missing: a call was read without it."""
    yield from source.spaces()
    yield from source.literal(END)
    return True


def _function(source: AnswerSource, calls: AnswerCalls) -> Reader[bool]:
    """Read a function behind ``<function=``."""
    name = (yield from source.upto(">")) or ""
    if (name := name.strip()) not in calls.offered:
        return False
    schema = calls.offered[name].get("properties")
    properties = schema if isinstance(schema, Mapping) else {}
    yield calls.begin(name)
    opened = False
    while True:
        yield from source.spaces()
        if not (yield from source.literal("<parameter=")):
            break
        if (parameter := (yield from source.upto(">"))) is None:
            break
        parameter = parameter.strip()
        yield calls.more(f"{', ' if opened else '{'}{written(parameter)}: ")
        opened = True
        if not (yield from _value(source, calls, properties.get(parameter))):
            return True
    yield from source.literal("</function>")
    yield calls.more("}" if opened else "{}")
    return True


def _value(source: AnswerSource, calls: AnswerCalls, schema: Any) -> Reader[bool]:
    """Tell a value, without the line break at each end; say whether it came to its end."""
    yield from source.literal("\n")
    known, as_text = marks("\n" + _END_OF_VALUE, _END_OF_VALUE), is_text(schema)
    if as_text:
        yield calls.more('"')
    parts: list[str] = []
    while True:
        found = known.find(source)
        part = source.take(found.start() if found else known.certain(source))
        if as_text and part:
            yield calls.more(written(part)[1:-1])
        parts.append(part)
        if found:
            source.at = found.end()
            break
        if source.ended:
            return False
        source.forget()
        yield None
    yield calls.more('"' if as_text else written(typed("".join(parts), schema)))
    return True


def _hermes(tools: Sequence[OfferedTool], spelling: Spelling, several: bool) -> CallGrammar:
    rules = f"call: nl body nl {spelling(END)}\nbody: {json_of(calls_schema(tools))}\n{_NEWLINE}"
    return CallGrammar(BEGIN, rules, MOST_CALLS if several else 1, "\n")


def _xml(tools: Sequence[OfferedTool], spelling: Spelling, several: bool) -> CallGrammar:
    closing = "\n</parameter>\n"
    ends, rule_of_text = spelling.until(closing, "text")
    names = [quoted(f"{FUNCTION}{tool.name}>\n") + f" a{at}" for at, tool in enumerate(tools)]
    rules = [
        f"call: nl one {quoted('</function>')} nl {spelling(END)}\n{_NEWLINE}{rule_of_text}",
        either(names, "one"),
    ]
    for at, tool in enumerate(tools):
        if is_open(tool.schema):
            rules.append(f'a{at}: ("<parameter=" /[^>\\n]+/ ">\\n" {ends})*\n')
            continue
        parts = []
        for number, (name, schema, needed) in enumerate(arguments(tool.schema)):
            rule = f"a{at}_v{number}"
            parts.append((quoted(f"<parameter={name}>\n") + f" {rule}", needed))
            choices = texts(schema)
            if choices is None:
                rules.append(f"{rule}: {rule}_j {quoted(closing)}\n{rule}_j: {tool.leaf(schema)}\n")
            else:
                spelled = [quoted(choice + closing) for choice in choices] or [ends]
                rules.append(either(spelled, rule))
        rules.append(row(f"a{at}", parts))
    return CallGrammar(BEGIN, "".join(rules), MOST_CALLS if several else 1, "\n")


HERMES: Final = ToolFormat(
    ToolParser.HERMES, (TemplateMarks(("<tool_call>",)),), tagged_blocks, _hermes, tokens=(BEGIN, END), end=END
)
QWEN3_CODER: Final = ToolFormat(
    ToolParser.QWEN3_CODER,
    (TemplateMarks(("<function=", "<tool_call>")),),
    tagged_blocks,
    _xml,
    tokens=(BEGIN, END),
    end=END,
)
