"""The map from Anthropic's bodies to conversations."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from inference_service.chat.request import (
    DEFAULT_TEMPERATURE,
    NO_HEADERS,
    SWITCHES,
    ChatRequest,
    ChatTool,
    NamedTool,
    ToolChoice,
    check_demand,
    check_tools,
    schema_constraint,
    with_effort,
)
from inference_service.http.anthropic import schema
from inference_service.http.anthropic.schema import CustomTool, MessagesBody, OutputFormat, PromptBody
from inference_service.http.anthropic.turns import turns_of
from inference_service.http.wire.body import names, request_fields
from inference_service.serving.bounds import refused
from inference_service.serving.request import Request, hinted

FORMAT: Final = "output_config.format"
OLD_FORMAT: Final = "output_format"
EFFORTS: Final = {"max": "xhigh"}
"""Words that templates do not know."""
CHOICES: Final[Mapping[str, ToolChoice]] = {"auto": "auto", "any": "required", "none": "none"}


def chat_of(body: PromptBody, headers: Mapping[str, str] = NO_HEADERS) -> ChatRequest:
    """Return the conversation that a body asks to continue.

    Raises:
        RequestInvalid: fields contradict each other, or a header is wrong.
    """
    turns, form, choice = tuple(turns_of(body)), _format(body), _choice(body.tool_choice)
    last = turns[-1]
    goes_on = last.role == "assistant"
    if goes_on:
        forced = choice == "required" or isinstance(choice, NamedTool)
        _check_last(body, bool(last.calls), bool(last.content), bool(form) or forced)
    tools = () if choice == "none" else tuple(_tool(nth, tool) for nth, tool in enumerate(body.tools or ()))
    check_demand(choice, tools)
    check_tools(choice, tools, turns)
    thinks = {} if body.thinking is None else dict.fromkeys(SWITCHES, body.thinking.type != "disabled")
    return ChatRequest(
        turns,
        _rest(body, headers),
        tools,
        choice,
        parallel=not (body.tool_choice and body.tool_choice.disable_parallel_tool_use),
        constraint=schema_constraint(form.schema_) if form else None,
        variables=with_effort(thinks, _effort(body)),
        starts=not goes_on,
        goes_on=goes_on,
        names=names(body),
    )


def _rest(body: PromptBody, headers: Mapping[str, str]) -> Request:
    """Return what is asked beside the conversation."""
    own: dict[str, Any] = {"prompt": "", "usual_temperature": DEFAULT_TEMPERATURE}
    user = None
    if isinstance(body, MessagesBody):
        own["stop"] = tuple(body.stop_sequences or ())
        user = body.metadata.user_id if body.metadata else None
    return Request.of(**request_fields(body) | own | hinted(headers, sticky_key=user or "")._asdict())


def _check_last(body: PromptBody, calls: bool, says: bool, constrained: bool) -> None:
    """Check a last turn of the assistant, which the answer continues."""
    place = f"messages[{len(body.messages) - 1}]"
    if calls:
        raise refused(place, "the results of its calls after it", "a turn of the assistant that ends in calls")
    if not says:
        raise refused(place, "text, which the answer continues", "none")
    if constrained:
        expected = "a turn of the user, where the answer must be a call or keep to a schema"
        raise refused(place, expected, "one of the assistant")


def _format(body: PromptBody) -> OutputFormat | None:
    new, old = body.output_config.format if body.output_config else None, body.output_format
    if new and old and new != old:
        raise refused(OLD_FORMAT, f"the same as {FORMAT}, or one of the two", "another")
    return new or old


def _tool(index: int, tool: CustomTool) -> ChatTool:
    lines = [tool.description] if tool.description else []
    if tool.input_examples:
        lines += [
            "Examples of its input:",
            *(json.dumps(each, ensure_ascii=False) for each in tool.input_examples),
        ]
    return ChatTool(tool.name, "\n".join(lines) or None, tool.input_schema, tool.strict, f"tools[{index}]")


def _choice(choice: schema.ToolChoice | None) -> ToolChoice | None:
    if choice is None:
        return None
    return NamedTool(choice.name) if choice.name is not None else CHOICES[choice.type]


def _effort(body: PromptBody) -> str | None:
    effort = body.output_config.effort if body.output_config else None
    return EFFORTS.get(effort, effort) if effort else None
