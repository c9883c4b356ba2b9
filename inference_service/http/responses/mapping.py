"""From the body of a response to that of a chat, and from a chat's faults back to the fields of the body."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

from inference_service.http.openai.chat_schema import ChatBody, JsonSchema, ResponseFormat, Tool
from inference_service.http.openai.mapping import refused
from inference_service.http.openai.schema import SamplingBody
from inference_service.http.responses.items import CompactionItem, Item, OutputItem
from inference_service.http.responses.schema import ResponsesBody, TextFormat
from inference_service.http.responses.tools import functions_of
from inference_service.http.responses.turns import messages_of
from loramux_shared.faults import Fault

FIELDS: Final = {
    "messages": "input",
    "prompt": "input",
    "max_tokens": "max_output_tokens",
    "logprobs": "top_logprobs",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
}
"""Fields of a chat that have another name here."""
_MESSAGE: Final = re.compile(r"messages\[\d+\].*")
_TOOL: Final = re.compile(r"tools\[(\d+)\]\.function\b")


def chat_of(body: ResponsesBody) -> ChatBody:
    """Return the chat that a body asks for.

    Raises:
        RequestInvalid: an output is that of no call, or reasoning or a compaction is not ours.
    """
    if not isinstance(body.input, str):
        _check_calls(body.input)
    shared = {name: getattr(body, name) for name in SamplingBody.model_fields}
    own: dict[str, Any] = {
        "messages": messages_of(body.instructions, body.input),
        "max_completion_tokens": body.max_output_tokens,
        "logprobs": body.logprobs is not None,
        "top_logprobs": body.logprobs,
        "tools": _tools(body),
        "tool_choice": body.tool_choice,
        "parallel_tool_calls": body.parallel_tool_calls,
        "response_format": _format(body.text.format if body.text else None),
        "reasoning_effort": body.reasoning.effort if body.reasoning else None,
        "chat_template_kwargs": body.chat_template_kwargs,
    }
    return ChatBody.model_construct(**shared | own)  # of values that were looked at


def _check_calls(items: Sequence[Item]) -> None:
    """Refuse outputs whose calls were left out: the model would be told what it never asked."""
    calls: set[str] = set()
    for index, item in enumerate(items):
        if isinstance(item, OutputItem):
            if item.call_id not in calls:
                expected = "the call_id of a function_call before it, behind the last compaction"
                raise refused(f"input[{index}].call_id", expected, repr(item.call_id[:80]))
        elif isinstance(item, CompactionItem):
            calls.clear()
        else:
            calls.add(getattr(item, "call_id", ""))


def _tools(body: ResponsesBody) -> tuple[Tool, ...] | None:
    return None if body.tools is None else tuple(each.tool() for each in functions_of(body.tools))


def _format(asked: TextFormat | None) -> ResponseFormat | None:
    if asked is None:
        return None
    schema = None
    if asked.schema_ is not None:
        told = {"name": asked.name, "schema": asked.schema_}
        schema = JsonSchema.model_validate(told | {"description": asked.description, "strict": asked.strict})
    return ResponseFormat(type=asked.type, json_schema=schema)


@contextmanager
def in_words_of(body: ResponsesBody) -> Iterator[None]:
    """Name the fields of faults as a body does.

    Raises:
        Fault: the same, about those.
    """
    try:
        yield
    except Fault as fault:
        findings = [each.model_copy(update={"where": _field(each.where, body)}) for each in fault.findings]
        raise type(fault)(fault.message, findings, fault.repository, fault.retry_after_s) from fault


def _field(where: str, body: ResponsesBody) -> str:
    if _MESSAGE.fullmatch(where):
        return "input"
    if tool := _TOOL.match(where):
        places = [each.place for each in functions_of(body.tools)]
        return places[int(tool[1])] + where[tool.end() :]
    return FIELDS.get(where, where)
