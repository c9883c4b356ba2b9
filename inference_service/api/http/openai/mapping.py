"""The map from the bodies of chats to conversations, and from those of plain completions to requests."""

import json
import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from inference_service.api.chat.request import (
    DEFAULT_TEMPERATURE,
    NO_HEADERS,
    Call,
    ChatRequest,
    ChatTool,
    Turn,
    check_demand,
    check_tools,
    listed_tools,
    schema_constraint,
    with_effort,
)
from inference_service.api.http.openai.chat_schema import ChatBody, ChatMessage, ResponseFormat, Tool
from inference_service.api.http.openai.schema import (
    MAX_CHOICES,
    CompletionBody,
    SamplingBody,
    StructuredOutputs,
)
from inference_service.api.http.wire.body import names, request_fields
from inference_service.api.requests.bounds import MAX_LOGPROBS, refused
from inference_service.api.requests.service import GenerationService
from inference_service.core.constraint import Constraint
from inference_service.core.request import PromptContent, Request, hinted

STRUCTURED = "structured_outputs"
DEFAULT_COMPLETION_TOKENS = 16
"""The API's; what a deployment or an adapter says comes before it."""


def chat_of(body: ChatBody, headers: Mapping[str, str] = NO_HEADERS) -> ChatRequest:
    """Return the conversation of a body; raise RequestInvalid for contradictions and wrong headers."""
    tools = listed_tools(body.tool_choice, map(tool_of, body.tools or ()))
    check_demand(body.tool_choice, tools)
    if body.top_logprobs is not None and not (body.logprobs and 0 <= body.top_logprobs <= MAX_LOGPROBS):
        raise refused("top_logprobs", f"0 to {MAX_LOGPROBS}, and logprobs: true", body.top_logprobs)
    turns = turns_of(body.messages)
    check_tools(body.tool_choice, tools, turns)
    limits = [each for each in (body.max_tokens, body.max_completion_tokens) if each is not None]
    constraint = one_constraint(_format(body.response_format), body.structured_outputs)
    variables = with_effort(body.chat_template_kwargs, body.reasoning_effort)
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    return ChatRequest(
        turns,
        request_of(body, headers, max_tokens=min(limits, default=None), logprobs=logprobs),
        tools,
        body.tool_choice,
        parallel=body.parallel_tool_calls is not False,
        constraint=constraint,
        variables=variables,
        starts=body.add_generation_prompt is not False,
        goes_on=bool(body.continue_final_message),
        shows_thoughts=body.include_reasoning is not False,
        names=partial(names, body),
    )


def turns_of(messages: Sequence[ChatMessage]) -> tuple[Turn, ...]:
    """Return the turns that messages are."""
    return tuple(
        Turn(
            message.role,
            message.content or message.refusal or "",
            message.name,
            message.tool_call_id,
            message.thought,
            tuple(
                Call(call.id, call.function.name, call.function.arguments) for call in message.tool_calls or ()
            ),
        )
        for message in messages
    )


def tool_of(tool: Tool) -> ChatTool:
    """Return a tool as conversations have it."""
    function = tool.function
    return ChatTool(function.name, function.description, function.parameters, function.strict)


def one_constraint(constraint: Constraint | None, outputs: StructuredOutputs | None) -> Constraint | None:
    """Return the constraint of a format, or of vLLM's way to say one; raise RequestInvalid for both."""
    structure = _structure(outputs)
    if constraint and structure:
        raise refused("structured_outputs", "none together with a response_format", "both")
    return constraint or structure


def completion_requests(
    body: CompletionBody, service: GenerationService, headers: Mapping[str, str] = NO_HEADERS
) -> list[Request]:
    """Return one request per prompt; raise RequestInvalid for contradicting fields, or a wrong header."""
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
    constraint = _structure(body.structured_outputs)
    return [
        request_of(
            body,
            headers,
            prompt=prompt,
            max_tokens=limit,
            prompt_logprobs=prompt_logprobs,
            constraint=constraint,
        )
        for prompt in body.prompt
    ]


def request_of(
    body: SamplingBody, headers: Mapping[str, str], *, prompt: PromptContent = "", **own: Any
) -> Request:
    """Return the request of a body: what it takes over, then what means something else here. Raise
    RequestInvalid for a wrong header.
    """
    own |= {"prompt": prompt, "usual_temperature": DEFAULT_TEMPERATURE, "priority": -(body.priority or 0)}
    own |= hinted(headers, body.min_generation or 0, body.user or "")._asdict()
    if body.request_id is not None:
        own["id"] = body.request_id
    return Request.of(**request_fields(body) | own)


def _format(response_format: ResponseFormat | None) -> Constraint | None:
    if response_format is None or response_format.type == "text":
        return None
    if response_format.json_schema is None:
        return Constraint("json_object")
    return schema_constraint(response_format.json_schema.schema_)


def _structure(outputs: StructuredOutputs | None) -> Constraint | None:
    match outputs and outputs.present:
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
