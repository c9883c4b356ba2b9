"""From bodies to requests."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

from inference_service.core.constraint import Constraint
from inference_service.http.openai.chat_schema import (
    AllowedTools,
    ChatBody,
    ChatMessage,
    NamedTool,
    ResponseFormat,
    Tool,
    ToolChoice,
)
from inference_service.http.openai.schema import MAX_CHOICES, CompletionBody, GenerationBody, StructuredOutputs
from inference_service.serving.bounds import MAX_LOGPROBS
from inference_service.serving.request import Message, Prompt, Request, hinted, told
from inference_service.serving.service import GenerationService
from inference_service.serving.sizes import check_texts
from inference_service.serving.turns import role_of, thought_of
from loramux_shared.faults import Finding, RequestInvalid

STRUCTURED = "structured_outputs"
SWITCHES: Final = ("enable_thinking", "thinking")
"""Variables with which templates turn thinking on and off: of Qwen, SmolLM and Gemma; of Granite."""
NO_HEADERS: Final[Mapping[str, str]] = MappingProxyType({})
DEFAULT_TEMPERATURE = 1.0
DEFAULT_COMPLETION_TOKENS = 16
"""Both are the API's; what a deployment or an adapter says comes before them."""


def chat_request(body: ChatBody, headers: Mapping[str, str] = NO_HEADERS) -> Request:
    """Return the request of a chat.

    Raises:
        RequestInvalid: fields contradict each other, or a header is wrong.
    """
    if body.top_logprobs is not None and not (body.logprobs and 0 <= body.top_logprobs <= MAX_LOGPROBS):
        raise refused("top_logprobs", f"0 to {MAX_LOGPROBS}, and logprobs: true", body.top_logprobs)
    tools = offered_tools(body)
    _check_allowed(body.tool_choice, tools)
    return _request(
        body,
        headers,
        prompt=messages_of(body.messages),
        max_tokens=_limit(body),
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        constraint=_constraint(body),
        chat_template_kwargs=_variables(body),
        tools=tuple(tool.model_dump(exclude_none=True) for tool in tools),
    )


def _variables(body: ChatBody) -> Mapping[str, Any]:
    """Return what the template is told beside the messages.

    Templates switch thinking off with other names than OpenAI's, and those that know none of them tell nobody.
    """
    said, effort = body.chat_template_kwargs or {}, body.reasoning_effort
    if effort is None:
        return said
    if said.get("reasoning_effort", effort) != effort:
        raise refused("reasoning_effort", "the same as chat_template_kwargs has, or one of the two", effort)
    off = dict.fromkeys(SWITCHES, False) if effort == "none" else {}
    return off | said | {"reasoning_effort": effort}


def _limit(body: ChatBody) -> int | None:
    new, old = body.max_completion_tokens, body.max_tokens
    if new is not None and old is not None and new != old:
        raise refused("max_tokens", "the same as max_completion_tokens, or one of the two", old)
    return old if new is None else new


def completion_requests(
    body: CompletionBody, service: GenerationService, headers: Mapping[str, str] = NO_HEADERS
) -> list[Request]:
    """Return one request per prompt.

    Raises:
        RequestInvalid: fields contradict each other, or a header is wrong.
    """
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise refused("best_of", "the same as n", body.best_of)
    if len(body.prompt) * (body.n or 1) > MAX_CHOICES:
        raise refused("n", f"at most {MAX_CHOICES} answers, to all prompts together", body.n)
    limit = body.max_tokens
    if limit is None:
        limit = service.default_max_tokens or DEFAULT_COMPLETION_TOKENS
    prompt_logprobs = body.prompt_logprobs
    if body.echo and prompt_logprobs is None and (body.logprobs is not None or limit == 0):
        prompt_logprobs = body.logprobs or 0
    return [
        _request(
            body,
            headers,
            prompt=prompt,
            max_tokens=limit,
            prompt_logprobs=prompt_logprobs,
            constraint=_structure(body.structured_outputs),
        )
        for prompt in body.prompt
    ]


def _request(body: GenerationBody, headers: Mapping[str, str], *, prompt: Prompt, **own: Any) -> Request:
    """Return a request: fields of a body that it has too by name, then those that mean something else here."""
    own |= {"prompt": prompt, "usual_temperature": DEFAULT_TEMPERATURE, "priority": -(body.priority or 0)}
    own |= hinted(headers, body.min_generation or 0, body.user or "")
    if body.request_id is not None:
        own["id"] = body.request_id
    return Request(**told(body, Request) | own)


def messages_of(messages: Sequence[ChatMessage]) -> list[Message]:
    """Return messages as chat templates know them.

    Raises:
        RequestInvalid: the arguments of their calls have too much in them.
    """
    check_texts(call.function.arguments for message in messages for call in message.tool_calls or ())
    return [_message(message) for message in messages]


def _message(message: ChatMessage) -> Message:
    made: dict[str, Any] = {"role": role_of(message.role), "content": message.content or message.refusal or ""}
    if message.name is not None:
        made["name"] = message.name
    if message.tool_call_id is not None:
        made["tool_call_id"] = message.tool_call_id
    if message.thought is not None:
        made |= thought_of(message.thought)
    if message.tool_calls:
        made["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.function.name, "arguments": _arguments(call.function.arguments)},
            }
            for call in message.tool_calls
        ]
    return made


def _arguments(text: str) -> Any:
    """Return the arguments as an object, which templates write as JSON; text that is none stays text."""
    try:
        arguments = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return arguments if isinstance(arguments, dict) else text


def offered_tools(body: ChatBody) -> tuple[Tool, ...]:
    """Return the tools that the model is told of."""
    return () if body.tool_choice == "none" else body.tools or ()


def callable_tools(body: ChatBody) -> tuple[Tool, ...]:
    """Return the tools that the answer may call."""
    tools, choice = offered_tools(body), body.tool_choice
    if not isinstance(choice, AllowedTools):
        return tools
    return tuple(tool for tool in tools if tool.function.name in choice.names)


def is_forced(body: ChatBody) -> bool:
    """True when the answer must be a call."""
    choice = body.tool_choice
    return choice == "required" or isinstance(choice, NamedTool) or getattr(choice, "mode", "") == "required"


def _constraint(body: ChatBody) -> Constraint | None:
    wanted, structure = _format(body.response_format), _structure(body.structured_outputs)
    if wanted and structure:
        raise refused("structured_outputs", "none beside a response_format", "both")
    if is_forced(body):
        demanded_tools(body)
        return None  # it is made when the model is known
    return wanted or structure


def _format(response_format: ResponseFormat | None) -> Constraint | None:
    if response_format is None or response_format.type == "text":
        return None
    if response_format.json_schema is None:
        return Constraint("json_object")
    return Constraint("json_schema", json.dumps(response_format.json_schema.schema_, ensure_ascii=False))


def _structure(outputs: StructuredOutputs | None) -> Constraint | None:
    match outputs and outputs.given:
        case {"json_": schema}:
            text = schema if isinstance(schema, str) else json.dumps(schema, ensure_ascii=False)
            return Constraint("json_schema", text, STRUCTURED)
        case {"regex": str(text)}:
            return Constraint("regex", text, STRUCTURED)
        case {"choice": texts}:
            return Constraint("regex", "|".join(map(re.escape, texts)), STRUCTURED)
        case {"grammar": str(text)}:
            return Constraint("gbnf", text, STRUCTURED)
        case {"json_object": True}:
            return Constraint("json_object", "", STRUCTURED)
    return None


def _check_allowed(choice: ToolChoice | None, tools: Sequence[Tool]) -> None:
    names = {tool.function.name for tool in tools}
    for name in choice.names if isinstance(choice, AllowedTools) else ():
        if name not in names:
            raise refused("tool_choice", "tools that tools holds", name)


def demanded_tools(body: ChatBody) -> Sequence[Tool]:
    """Return the tools of which one must be called.

    Raises:
        RequestInvalid: there is none, or not the one that is named.
    """
    choice, tools = body.tool_choice, callable_tools(body)
    if not tools:
        raise refused("tool_choice", "auto or none, where there are no tools", getattr(choice, "name", choice))
    if isinstance(choice, NamedTool):
        tools = tuple(tool for tool in tools if tool.function.name == choice.name)
        if not tools:
            raise refused("tool_choice", "a tool that tools holds", choice.name)
    return tools


def refused(where: str, expected: str, found: object) -> RequestInvalid:
    """Return the fault of a field that cannot be taken with the others."""
    finding = Finding(code="E_BAD_FIELD", where=where, expected=expected, found=str(found))
    return RequestInvalid("the request cannot be taken as it is.", [finding])
