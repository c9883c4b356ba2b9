"""The prompt and the constraint of a message."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any

from inference_service.core.constraint import Constraint, Kind
from inference_service.serving.request import Message, PromptContent
from inference_service.serving.sizes import check_ids, check_texts
from inference_service.serving.turns import role_of, thought_of
from loramux.inference.v1 import inference_pb2 as pb
from loramux_shared.faults import Finding, RequestInvalid

_KINDS: Mapping[str, Kind] = {
    "json_object": "json_object",
    "json_schema": "json_schema",
    "regex": "regex",
    "lark": "lark",
}


def prompt_of(message: pb.GenerateRequest, max_seq_len: int) -> PromptContent:
    """Return the prompt, messages as chat templates know them.

    Raises:
        PromptTooLong: there are more token ids than max_seq_len.
        RequestInvalid: the arguments of a tool call are not a JSON object, or all JSON has too much in it.
    """
    kind = message.WhichOneof("prompt")
    if kind == "text":
        return str(message.text)
    if kind == "token_ids":
        check_ids(message.token_ids.ids, max_seq_len)
        return list(message.token_ids.ids)
    turns = message.messages
    calls = (call.arguments for turn in turns.messages for call in turn.tool_calls)
    check_texts(chain(calls, (tool.parameters for tool in turns.tools), [turns.chat_template_kwargs]))
    return [_turn(index, item) for index, item in enumerate(message.messages.messages)]


def tools_of(message: pb.GenerateRequest) -> tuple[Mapping[str, Any], ...]:
    """Return the tools, in the shape of the OpenAI API, which chat templates render.

    Raises:
        RequestInvalid: the parameters of a tool are not a JSON object.
    """
    return tuple(_tool(index, tool) for index, tool in enumerate(message.messages.tools))


def variables_of(message: pb.GenerateRequest) -> Mapping[str, Any]:
    """Return the variables of the chat template.

    Raises:
        RequestInvalid: they are not a JSON object.
    """
    return _object("messages.chat_template_kwargs", message.messages.chat_template_kwargs or "{}")


def constraint_of(message: pb.GenerateRequest) -> Constraint | None:
    """Return the constraint, None where there is none."""
    kind = message.constraint.WhichOneof("kind")
    if kind is None:
        return None
    return Constraint(_KINDS[kind], "" if kind == "json_object" else getattr(message.constraint, kind))


def _turn(index: int, message: pb.Message) -> Message:
    calls = [_call(f"messages.messages[{index}]", call) for call in message.tool_calls]
    turn: dict[str, Any] = {"role": role_of(message.role), "content": message.content}
    if calls:
        turn |= {"content": message.content or None, "tool_calls": calls}
    if message.reasoning:
        turn |= thought_of(message.reasoning)
    return turn | _given(message, ("name", "tool_call_id"))


def _call(where: str, call: pb.ToolCall) -> Mapping[str, Any]:
    arguments = _object(f"{where}.tool_calls.arguments", call.arguments or "{}")
    function = {"name": call.name, "arguments": arguments}
    return {"type": "function", "function": function} | _given(call, ("id",))


def _tool(index: int, tool: pb.Tool) -> Mapping[str, Any]:
    function: dict[str, Any] = {"name": tool.name} | _given(tool, ("description",))
    if tool.parameters:
        function["parameters"] = _object(f"messages.tools[{index}].parameters", tool.parameters)
    return {"type": "function", "function": function}


def _given(message: Any, names: Iterable[str]) -> dict[str, str]:
    return {name: value for name in names if (value := getattr(message, name))}


def _object(where: str, text: str) -> Mapping[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        found = str(error)[:200]
    else:
        if isinstance(value, dict):
            return value
        found = type(value).__name__
    finding = Finding(code="E_BAD_FIELD", where=where, expected="a JSON object as text", found=found)
    raise RequestInvalid(f"the request has a field that is no JSON object: {where}.", [finding])
