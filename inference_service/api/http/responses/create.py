"""``POST /v1/responses``: items in; a response out, whole or in events.

Source: `openai.types.responses.Response`; which fields there must be, https://www.openresponses.org/reference
"""

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from itertools import count
from typing import Any, Final

from starlette.requests import Request as HttpRequest

from inference_service.api.chat.conversation import AnswerPart, Conversation
from inference_service.api.chat.request import (
    DEFAULT_TEMPERATURE,
    AllowedTools,
    ChatRequest,
    NamedTool,
    ToolChoice,
)
from inference_service.api.http.responses.answers import (
    AnsweredItem,
    InputTokens,
    Response,
    ResponseError,
    ResponseEvent,
    ResponseUsage,
)
from inference_service.api.http.responses.items import functions_of
from inference_service.api.http.responses.mapping import chat_of
from inference_service.api.http.responses.output import OutputItems, event_of
from inference_service.api.http.responses.schema import ResponsesBody, TextConfig
from inference_service.api.http.wire.body import read_body
from inference_service.api.http.wire.errors import error_body, status_of
from inference_service.api.http.wire.reply import (
    DONE,
    EventStream,
    Framing,
    Head,
    Reply,
    named_event,
    open_stream,
    while_connected,
)
from inference_service.api.requests.service import GenerationService
from inference_service.api.requests.terms import first
from inference_service.core.request import AnswerDelta, AnswerFinished, AnswerStarted
from inference_service.core.sequence import EndReason
from inference_service.core.served_model import AdapterDefaults
from loramux_shared.faults import Fault, PromptTooLong


class ResponseObject:
    """A response to one body, in each of its states."""

    def __init__(self, body: ResponsesBody, head: Head, defaults: AdapterDefaults) -> None:
        """Describe the response to a body that was accepted; defaults are those of the model that answers."""
        self.under_way: Response = {
            "id": head.id,
            "object": "response",
            "created_at": head.created,
            "model": head.model,
            "status": "in_progress",
            "completed_at": None,
            "error": None,
            "incomplete_details": None,
            "output": [],
            "usage": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "max_tool_calls": body.max_tool_calls,
            "tools": [tool.to_dict() for tool in body.tools or ()],
            "tool_choice": _choice(body.tool_choice),
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "text": _text(body.text),
            "reasoning": {"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
            "temperature": first(body.temperature, defaults.temperature, DEFAULT_TEMPERATURE),
            "top_p": first(body.top_p, defaults.top_p, 1.0),
            "presence_penalty": body.presence_penalty or 0.0,
            "frequency_penalty": body.frequency_penalty or 0.0,
            "top_logprobs": body.top_logprobs or 0,
            "truncation": body.truncation or "disabled",
            "metadata": body.metadata or {},
            "user": body.user,
            "safety_identifier": body.safety_identifier,
            "prompt_cache_key": body.prompt_cache_key,
            "service_tier": "default",
            "store": False,
            "background": False,
            "previous_response_id": None,
        }

    def ended(self, finished: AnswerFinished, output: list[AnsweredItem], reasoning_tokens: int) -> Response:
        """Return the response with its output."""
        whole: Response = {**self.under_way, "output": output, "usage": usage_of(finished, reasoning_tokens)}
        if finished.reason is EndReason.LENGTH:
            return {**whole, "status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}}
        return {**whole, "status": "completed", "completed_at": int(time.time())}

    def failed(self, fault: Fault, output: list[AnsweredItem]) -> Response:
        """Return the response with the output before it failed."""
        return {**self.under_way, "status": "failed", "error": _error(fault), "output": output}


def _choice(choice: ToolChoice | None) -> str | dict[str, Any]:
    match choice:
        case NamedTool(name):
            return {"type": "function", "name": name}
        case AllowedTools(mode, names):
            tools = [{"type": "function", "name": name} for name in names]
            return {"type": "allowed_tools", "mode": mode, "tools": tools}
    return choice or "auto"


def _text(text: TextConfig | None) -> dict[str, Any]:
    text_format = text.format if text else None
    form: dict[str, Any] = {"type": text_format.type if text_format else "text"}
    if text_format and text_format.schema_ is not None:
        form |= {
            "name": text_format.name,
            "description": text_format.description,
            "schema": text_format.schema_,
        }
        form["strict"] = text_format.strict is not False
    return {"format": form, "verbosity": "medium"}


def usage_of(finished: AnswerFinished, reasoning_tokens: int) -> ResponseUsage:
    """Return the tokens of a response."""
    tokens = finished.usage
    return {
        "input_tokens": tokens.prompt_tokens,
        "input_tokens_details": {"cached_tokens": tokens.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": tokens.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": reasoning_tokens},
        "total_tokens": tokens.total_tokens,
    }


def _error(fault: Fault) -> ResponseError:
    """Return a fault as the error of a response: code is one of OpenAI's, reason is the fault's own name."""
    error, status = error_body(fault)["error"], status_of(fault)
    code = "rate_limit_exceeded" if status == 429 else "invalid_prompt" if status < 500 else "server_error"
    return {**error, "code": code, "reason": error["code"] or ""}


FRAMING: Final = Framing(named_event, error_body, DONE)
"""A fault is an event of its own, made here; ``[DONE]`` is always the end."""


async def create_response(
    service: GenerationService, http: HttpRequest
) -> Reply[Response] | EventStream[ResponseEvent]:
    """Create a response."""
    body = await read_body(http, ResponsesBody)
    chat = chat_of(body, http.headers)
    if body.truncation == "auto":
        chat = await while_connected(http.receive, fitted(service, chat))
    answer = ResponseAnswer(service, body, Conversation(service, chat))
    if body.stream:
        return await open_stream(http.receive, answer.events(), answer.head, FRAMING)
    whole = await while_connected(http.receive, answer.whole())
    return Reply(whole, headers=answer.head.headers)


async def count_input(service: GenerationService, http: HttpRequest) -> Reply[InputTokens]:
    """Count the tokens of a response's prompt."""
    body = await read_body(http, ResponsesBody)
    tokens = await Conversation(service, chat_of(body, http.headers)).prompt_tokens()
    return Reply({"object": "response.input_tokens", "input_tokens": tokens})


class ResponseAnswer:
    """A conversation and its answer, in the form of this route."""

    def __init__(self, service: GenerationService, body: ResponsesBody, conversation: Conversation) -> None:
        self._service = service
        self._body = body
        self._conversation = conversation
        self._number = count().__next__
        self._output = OutputItems(None, (), carries=body.carries)
        self.head = Head(f"resp_{self._conversation.request.id}", body.model)
        self._resource: ResponseObject | None = None
        """Known when the request was accepted."""
        self._begun = False
        """True when there was an event."""
        self._ended: Response | None = None

    async def whole(self) -> Response:
        """Return the response at once, or raise why it failed."""
        async with aclosing(self._events()) as events:
            async for _ in events:
                pass
        assert self._ended is not None  # noqa: S101 - a response that did not fail ends
        return self._ended

    async def events(self) -> AsyncGenerator[ResponseEvent]:
        """Yield the events of the response; the first with the first token, the last says how it ended. Raise a
        failure before the first event.
        """
        try:
            async with aclosing(self._events()) as events:
                async for event in events:
                    yield event
        except Fault as fault:
            if self._resource is None or not self._begun:
                raise
            yield self._state("failed", self._resource.failed(fault, self._output.items()))

    async def _events(self) -> AsyncGenerator[ResponseEvent]:
        async with aclosing(self._conversation.events()) as events:
            async for event in events:
                match event:
                    case AnswerStarted():
                        self._resource = await self._begin(event)
                    case AnswerPart() if self._resource is not None:
                        if not self._begun:
                            self._begun = True
                            yield self._state("created", self._resource.under_way)
                            yield self._state("in_progress", self._resource.under_way)
                        for each in self._read(self._resource, event):
                            yield each

    async def _begin(self, started: AnswerStarted) -> ResponseObject:
        self.head.begin(started)
        scored = None if self._body.logprobs is None else started.text
        functions = functions_of(self._body.tools)
        self._output = OutputItems(scored, functions, carries=self._body.carries, number=self._number)
        return ResponseObject(self._body, self.head, await self._service.defaults(started.model))

    def _read(self, resource: ResponseObject, part: AnswerPart) -> list[ResponseEvent]:
        """Collect more of the answer, or its end; return the events of it."""
        if isinstance(part.event, AnswerDelta):
            return [*self._output.take(part.pieces, part.event.tokens)]
        cut = part.event.reason is EndReason.LENGTH
        events = self._output.end(part.pieces, "incomplete" if cut else "completed")
        self._ended = resource.ended(part.event, self._output.items(), self._output.reasoning_tokens)
        return [*events, self._state("incomplete" if cut else "completed", self._ended)]

    def _state(self, kind: str, response: Response) -> ResponseEvent:
        return event_of(kind, self._number, response=response)


async def fitted(service: GenerationService, chat: ChatRequest) -> ChatRequest:
    """Return a chat that leaves its answer room: without as few of the first turns as possible.

    A turn begins where the user speaks; system messages before the first one stay. A conversation whose last
    turn is too long becomes that turn. Raise why the chat cannot be counted, for another reason than its
    length.
    """
    if await _fits(service, chat):
        return chat
    shorter = _shorter(chat)
    fits, least = len(shorter) - 1, 1
    while least < fits:
        tried = (least + fits) // 2
        if await _fits(service, shorter[tried]):
            fits = tried
        else:
            least = tried + 1
    return shorter[fits]


def _shorter(chat: ChatRequest) -> list[ChatRequest]:
    """Return a chat, then without its first turn, its first two, and so on to the last one alone."""
    turns = chat.turns
    begins = [nth for nth, turn in enumerate(turns) if turn.role == "user"]
    system = next((nth for nth, turn in enumerate(turns) if turn.role not in ("system", "developer")), 0)
    cut = [turns[:system] + turns[begin:] for begin in begins if begin > system]
    return [chat, *(replace(chat, turns=rest) for rest in cut)]


async def _fits(service: GenerationService, chat: ChatRequest) -> bool:
    try:
        tokens = await Conversation(service, chat).prompt_tokens()
    except PromptTooLong:
        return False
    return tokens + _answer(chat, service) <= service.limits.max_seq_len


def _answer(chat: ChatRequest, service: GenerationService) -> int:
    """Return how many tokens of answer a chat must leave room for."""
    if chat.rest.sampling.max_tokens is not None:
        return chat.rest.sampling.max_tokens
    return min(service.default_max_tokens or 1, service.limits.max_seq_len - 1)
