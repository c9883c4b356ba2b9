"""Calls of Mistral's models, as a list or each behind a mark of its own, with ids of nine letters and digits.

::

    [TOOL_CALLS][{"name": "weather", "arguments": {"city": "Oslo"}}]              Mistral 7B, Nemo, Small 3.1
    [TOOL_CALLS]weather[ARGS]{"city": "Oslo"}[TOOL_CALLS]news[CALL_ID]a1b2c3d4e[ARGS]{}    newer ones

Source: chat templates of Mistral-Nemo-Instruct-2407, Mistral-Small-3.2-24B-Instruct-2506 and
Ministral-3-8B-Instruct-2512.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import string
from collections.abc import Mapping, Sequence
from typing import Final

from inference_service.chat.formats.format import TemplateMarks, ToolFormat
from inference_service.chat.formats.frame import Block
from inference_service.chat.formats.json_calls import json_arguments, list_of_calls
from inference_service.chat.formats.lark import (
    MOST_CALLS,
    CallGrammar,
    OfferedTool,
    Spelling,
    either,
    json_of,
    list_schema,
)
from inference_service.chat.formats.source import AnswerSource, Reader
from inference_service.chat.pieces import AnswerCalls
from inference_service.serving.request import Message
from loramux_shared.runtime import ToolParser

MARK: Final = "[TOOL_CALLS]"
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

    return {MARK: read}


def _mistral(tools: Sequence[OfferedTool], spelling: Spelling, several: bool) -> CallGrammar:
    if not spelling.is_special(ARGS):
        rules = f'call: " "? body\nbody: {json_of(list_schema(tools, MOST_CALLS if several else 1))}\n'
        return CallGrammar(MARK, rules)
    own_id = f"({spelling(ID)} /[a-zA-Z0-9]{{9}}/)? " if spelling.is_special(ID) else ""
    each = [f"{spelling(tool.name)} {own_id}{spelling(ARGS)} {json_of(tool.schema)}" for tool in tools]
    return CallGrammar(MARK, either(each), MOST_CALLS if several else 1)


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
    (TemplateMarks((MARK,)),),
    mistral_blocks,
    _mistral,
    tokens=(MARK, ID, ARGS),
    new_id=short_id,
    turns=with_short_ids,
)
