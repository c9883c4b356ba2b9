"""Calls as JSON: of Granite 3, Phi-4 mini, Llama 3 and Mistral's models.

::

    <|tool_call|>[{"name": "weather", "arguments": {"city": "Oslo"}}]             Granite 3
    <|tool_call|>[{"name": "weather", "arguments": {"city": "Oslo"}}]<|/tool_call|>    Phi-4 mini
    functools[{"name": "weather", "arguments": {"city": "Oslo"}}]                 Phi-4 mini, too
    {"name": "weather", "parameters": {"city": "Oslo"}}; {"name": "news", "parameters": {}}       Llama 3
    <|python_tag|>{"name": "weather", "parameters": {"city": "Oslo"}}                             Llama 3, too
    [TOOL_CALLS][{"name": "weather", "arguments": {"city": "Oslo"}}]              Mistral 7B, Nemo, Small 3.1
    [TOOL_CALLS]weather[ARGS]{"city": "Oslo"}[TOOL_CALLS]news[CALL_ID]a1b2c3d4e[ARGS]{}    newer ones

Mistral's templates take ids of nine letters and digits.
Source: chat templates of granite-3.3-2b-instruct, Phi-4-mini-instruct, Llama-3.2-3B-Instruct,
Mistral-Nemo-Instruct-2407, Mistral-Small-3.2-24B-Instruct-2506 and Ministral-3-8B-Instruct-2512.
"""

import hashlib
import re
import secrets
import string
from collections.abc import Mapping, Sequence
from typing import Final

from inference_service.api.chat.formats import tagged
from inference_service.api.chat.formats.json_calls import json_arguments, json_calls, list_of_calls
from inference_service.api.chat.formats.lark import (
    MOST_CALLS,
    CallGrammar,
    OfferedTool,
    Spelling,
    calls_schema,
    either,
    json_of,
    list_schema,
)
from inference_service.api.chat.formats.reading import AnswerSource, Block, Reader, TemplateMarks, ToolFormat
from inference_service.api.chat.request import AnswerCalls
from inference_service.core.request import Message
from loramux_shared.runtime import ToolParser

MARK: Final = "<|tool_call|>"
PHI_END: Final = "<|/tool_call|>"
PHI_WORD: Final = "functools"


def granite_blocks(calls: AnswerCalls) -> Mapping[str, Block]:
    """Return the readers of Granite's calls; Granite 3.1 spells the mark as a tag, Granite 4 closes it."""
    return {MARK: list_of_calls(calls), tagged.BEGIN: list_of_calls(calls, tagged.END)}


def _granite(tools: Sequence[OfferedTool], spelling: Spelling, several: bool) -> CallGrammar:
    rules = f"call: {json_of(list_schema(tools, MOST_CALLS if several else 1))}\n"
    return CallGrammar(MARK, rules, narrow=spelling.is_special(tagged.BEGIN))


def phi_blocks(calls: AnswerCalls) -> Mapping[str, Block]:
    """Return the readers of Phi's calls."""
    return {MARK: list_of_calls(calls, PHI_END), PHI_WORD: list_of_calls(calls)}


def _phi(tools: Sequence[OfferedTool], spelling: Spelling, several: bool) -> CallGrammar:
    rules = f"body: {json_of(list_schema(tools, MOST_CALLS if several else 1))}\n"
    if spelling.is_special(MARK):
        return CallGrammar(MARK, f"call: body {spelling(PHI_END)}\n{rules}")
    return CallGrammar(PHI_WORD, f"call: body\n{rules}")


GRANITE: Final = ToolFormat(
    ToolParser.GRANITE,
    (
        TemplateMarks(("<|start_of_role|>", "<|tool_call|>")),
        TemplateMarks(("<|start_of_role|>", "available_tools"), without="<tool_call>"),
    ),
    granite_blocks,
    _granite,
    tokens=(MARK, tagged.BEGIN, tagged.END),
)
PHI4: Final = ToolFormat(
    ToolParser.PHI4,
    (TemplateMarks(("<|tool|>",)), TemplateMarks(("functools[",))),
    phi_blocks,
    _phi,
    tokens=(MARK, PHI_END),
)


PYTHON_TAG: Final = "<|python_tag|>"


def llama_leading(calls: AnswerCalls) -> Block:
    """Return the reader of calls as JSON."""

    def read(source: AnswerSource) -> Reader[bool]:
        return (yield from json_calls(source, calls))

    return read


def llama_blocks(calls: AnswerCalls) -> Mapping[str, Block]:
    """Return the reader of calls behind the tag."""

    def read(source: AnswerSource) -> Reader[bool]:
        yield from source.spaces()
        return (yield from json_calls(source, calls))

    return {PYTHON_TAG: read}


def _llama(tools: Sequence[OfferedTool], spelling: Spelling, several: bool) -> CallGrammar:
    del spelling, several  # Llama's template renders one call
    return CallGrammar("", f"call: {json_of(calls_schema(tools, 'parameters'))}\n")


LLAMA3_JSON: Final = ToolFormat(
    ToolParser.LLAMA3_JSON,
    (TemplateMarks(("<|start_header_id|>", '"parameters"')), TemplateMarks(("<|python_tag|>",))),
    llama_blocks,
    _llama,
    leading=llama_leading,
    tokens=(PYTHON_TAG,),
)


TOOL_CALLS: Final = "[TOOL_CALLS]"
ID: Final = "[CALL_ID]"
ARGS: Final = "[ARGS]"
SHORT: Final = 9
"""Letters and digits of an id that its templates take."""
_LETTERS: Final = string.ascii_letters + string.digits
_NAME: Final = re.compile(r"[A-Za-z0-9_.\-]{1,64}")
_ID: Final = re.compile(r"[A-Za-z0-9_\-]{0,64}")


def mistral_blocks(calls: AnswerCalls) -> Mapping[str, Block]:
    """Return the reader of Mistral's calls, in both forms."""
    listed = list_of_calls(calls)

    def read(source: AnswerSource) -> Reader[bool]:
        yield from source.spaces()
        if source.text.startswith(("[", "{"), source.at):
            return (yield from listed(source))
        name = yield from source.match(_NAME)
        if name is None or name[0] not in calls.offered:
            return False
        if (yield from source.literal(ID)):
            yield from source.match(_ID)
        yield from source.literal(ARGS)
        yield from source.spaces()
        if not source.text.startswith("{", source.at):
            return False
        yield calls.begin(name[0])
        yield from json_arguments(source, calls)
        return True

    return {TOOL_CALLS: read}


def _mistral(tools: Sequence[OfferedTool], spelling: Spelling, several: bool) -> CallGrammar:
    if not spelling.is_special(ARGS):
        rules = f'call: " "? body\nbody: {json_of(list_schema(tools, MOST_CALLS if several else 1))}\n'
        return CallGrammar(TOOL_CALLS, rules)
    own_id = f"({spelling(ID)} /[a-zA-Z0-9]{{9}}/)? " if spelling.is_special(ID) else ""
    each = [f"{spelling(tool.name)} {own_id}{spelling(ARGS)} {json_of(tool.schema)}" for tool in tools]
    return CallGrammar(TOOL_CALLS, either(each), MOST_CALLS if several else 1)


def short_id() -> str:
    """Return an id for a new call."""
    return "".join(secrets.choice(_LETTERS) for _ in range(SHORT))


def with_short_ids(messages: Sequence[Message]) -> list[Message]:
    """Return turns whose ids of calls have nine letters and digits; the same id becomes the same."""
    return [_with_short_ids(message) for message in messages]


def _with_short_ids(message: Message) -> Message:
    own = dict(message)
    if "tool_calls" in own:
        own["tool_calls"] = [{**call, "id": _short(call.get("id", ""))} for call in own["tool_calls"]]
    if "tool_call_id" in own:
        own["tool_call_id"] = _short(own["tool_call_id"])
    return own


def _short(own: str) -> str:
    if len(own) == SHORT and own.isascii() and own.isalnum():
        return own
    return hashlib.sha256(own.encode(errors="replace")).hexdigest()[:SHORT]


MISTRAL: Final = ToolFormat(
    ToolParser.MISTRAL,
    (TemplateMarks(("[TOOL_CALLS]",)),),
    mistral_blocks,
    _mistral,
    tokens=(TOOL_CALLS, ID, ARGS),
    new_id=short_id,
    turns=with_short_ids,
)
