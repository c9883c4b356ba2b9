"""From Anthropic's bodies to those of chats, and from a chat's places back to Anthropic's."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from inference_service.http.anthropic.schema import CustomTool, MessagesBody, OutputFormat, ToolChoice, Turns
from inference_service.http.anthropic.turns import turns_of
from inference_service.http.openai.chat_schema import ChatBody, Function, JsonSchema, ResponseFormat, Tool
from inference_service.http.openai.mapping import refused
from loramux_shared.faults import Fault, Finding

F = TypeVar("F", bound=Fault)
FORMAT: Final = "output_config.format"
OLD_FORMAT: Final = "output_format"
PLACES: Final[Mapping[str, str]] = {"stop": "stop_sequences", "response_format": FORMAT, "constraint": FORMAT}
"""What a chat calls otherwise."""
EFFORTS: Final = {"max": "xhigh"}
"""Words that templates do not know."""
THINKING: Final = ("enable_thinking", "thinking")
"""Variables with which templates turn thinking on and off."""
_TURN: Final = re.compile(r"messages\[(\d+)\]")


@dataclass(frozen=True)
class Chat:
    """A request as the chat door knows it."""

    body: ChatBody
    places: Sequence[str]
    """Where its messages stood."""

    def retold(self, fault: F) -> F:
        """Return a fault whose findings name what the client sent."""
        findings = [each.model_copy(update={"where": self._place(each)}) for each in fault.findings]
        return type(fault)(fault.message, findings, fault.repository, fault.retry_after_s)

    def _place(self, finding: Finding) -> str:
        where = finding.where
        if (turn := _TURN.match(where)) and int(turn[1]) < len(self.places):
            return self.places[int(turn[1])]
        if where == "continue_final_message":
            return self.places[-1]
        return PLACES.get(where, where).replace(".function.name", ".name")


def chat_of(body: Turns) -> Chat:
    """Return the chat that a body asks for.

    Raises:
        RequestInvalid: fields contradict each other.
    """
    turns = turns_of(body)
    messages = [turn.message for turn in turns]
    goes_on = messages[-1].role == "assistant"
    wanted = _format(body)
    forced = body.tool_choice is not None and body.tool_choice.type in ("any", "tool")
    if goes_on:
        _check_last(body, bool(messages[-1].tool_calls), bool(messages[-1].content), bool(wanted) or forced)
    chosen = {} if body.tool_choice is None else _choice(body.tool_choice)
    fields = {
        "model": body.model,
        "messages": tuple(messages),
        "tools": None if body.tools is None else tuple(map(_tool, body.tools)),
        "response_format": wanted and _wanted(wanted),
        "add_generation_prompt": not goes_on,
        "continue_final_message": goes_on,
        "chat_template_kwargs": _variables(body),
        "reasoning_effort": _effort(body),
    }
    return Chat(ChatBody(**fields | chosen | _sampling(body)), [turn.place for turn in turns])


def _sampling(body: Turns) -> dict[str, Any]:
    """Return what the route that answers reads beside the conversation."""
    if not isinstance(body, MessagesBody):
        return {}
    return {
        "max_tokens": body.max_tokens,
        "stop": list(body.stop_sequences or ()),
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": body.top_k,
        "stream": body.stream,
        "user": body.metadata.user_id if body.metadata else None,
    }


def _check_last(body: Turns, calls: bool, says: bool, constrained: bool) -> None:
    """Look at a last turn of the assistant, with which the answer goes on."""
    place = f"messages[{len(body.messages) - 1}]"
    if calls:
        raise refused(place, "the results of its calls behind it", "a turn of the assistant that ends in calls")
    if not says:
        raise refused(place, "text, which the answer goes on with", "none")
    if constrained:
        expected = "a turn of the user, where the answer must be a call or keep to a schema"
        raise refused(place, expected, "one of the assistant")


def _format(body: Turns) -> OutputFormat | None:
    new, old = body.output_config.format if body.output_config else None, body.output_format
    if new and old and new != old:
        raise refused(OLD_FORMAT, f"the same as {FORMAT}, or one of the two", "another")
    return new or old


def _wanted(wanted: OutputFormat) -> ResponseFormat:
    schema = JsonSchema.model_validate({"name": wanted.name or "output", "schema": wanted.schema_})
    return ResponseFormat(type="json_schema", json_schema=schema)


def _tool(tool: CustomTool) -> Tool:
    told = [tool.description] if tool.description else []
    if tool.input_examples:
        told += [
            "Examples of its input:",
            *(json.dumps(each, ensure_ascii=False) for each in tool.input_examples),
        ]
    function = Function(
        name=tool.name,
        description="\n".join(told) or None,
        parameters=tool.input_schema,
        strict=tool.strict,
    )
    return Tool(type="function", function=function)


def _choice(choice: ToolChoice) -> dict[str, Any]:
    parallel = None if choice.disable_parallel_tool_use is None else not choice.disable_parallel_tool_use
    if choice.type == "tool":
        chosen: Any = {"type": "function", "function": {"name": choice.name}}
    else:
        chosen = {"auto": "auto", "any": "required", "none": "none"}[choice.type]
    return {"tool_choice": chosen, "parallel_tool_calls": parallel}


def _variables(body: Turns) -> dict[str, Any] | None:
    if body.thinking is None:
        return None
    return dict.fromkeys(THINKING, body.thinking.type != "disabled")


def _effort(body: Turns) -> str | None:
    effort = body.output_config.effort if body.output_config else None
    return EFFORTS.get(effort, effort) if effort else None
