"""``POST /v1/responses``: items in, items out, whole or in events."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from itertools import count
from typing import Final

from starlette.requests import Request as HttpRequest

from inference_service.chat.conversation import AnswerPart, Conversation
from inference_service.chat.request import ChatRequest
from inference_service.core.sequence import EndReason
from inference_service.http.responses.answers import (
    InputTokens,
    Response,
    ResponseEvent,
    ResponseStateEvent,
    StateKind,
)
from inference_service.http.responses.mapping import chat_of
from inference_service.http.responses.output import OutputEvent, OutputItems
from inference_service.http.responses.resource import ResponseObject
from inference_service.http.responses.schema import ResponsesBody
from inference_service.http.responses.tools import functions_of
from inference_service.http.wire.body import read_body
from inference_service.http.wire.errors import error_body
from inference_service.http.wire.reply import (
    DONE,
    EventStream,
    Framing,
    Head,
    Reply,
    named_event,
    open_stream,
    while_connected,
)
from inference_service.serving.request import AnswerDelta, AnswerStarted
from inference_service.serving.service import GenerationService
from loramux_shared.faults import Fault, PromptTooLong

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

    async def whole(self) -> Response:
        """Return the response at once.

        Raises:
            Fault: it failed.
        """
        response: Response | None = None
        async with aclosing(self._events()) as events:
            async for event in events:
                if event["type"] in ("response.completed", "response.incomplete"):
                    response = event["response"]
        assert response is not None  # noqa: S101 - a response that did not fail ends
        return response

    async def events(self) -> AsyncGenerator[ResponseEvent]:
        """Yield the events of the response; the first with the first token, the last says how it ended.

        Raises:
            Fault: it failed before the first event.
        """
        try:
            async with aclosing(self._events()) as events:
                async for event in events:
                    yield event
        except Fault as fault:
            if self._resource is None or not self._begun:
                raise
            yield self._state("response.failed", self._resource.failed(fault, self._output.items()))

    async def _events(self) -> AsyncGenerator[ResponseStateEvent | OutputEvent]:
        async with aclosing(self._conversation.events()) as events:
            async for event in events:
                match event:
                    case AnswerStarted():
                        self._resource = await self._begin(event)
                    case AnswerPart() if self._resource is not None:
                        if not self._begun:
                            self._begun = True
                            yield self._state("response.created", self._resource.under_way())
                            yield self._state("response.in_progress", self._resource.under_way())
                        for each in self._read(self._resource, event):
                            yield each

    async def _begin(self, started: AnswerStarted) -> ResponseObject:
        self.head.begin(started)
        scored = None if self._body.logprobs is None else started.text
        functions = functions_of(self._body.tools)
        self._output = OutputItems(scored, functions, carries=self._body.carries, number=self._number)
        return ResponseObject(self._body, self.head, await self._service.naming.defaults(started.model))

    def _read(self, resource: ResponseObject, part: AnswerPart) -> list[ResponseStateEvent | OutputEvent]:
        """Collect more of the answer, or its end; return the events of it."""
        if isinstance(part.event, AnswerDelta):
            return [*self._output.take(part.pieces, part.event.tokens)]
        cut = part.event.reason is EndReason.LENGTH
        events = self._output.end(part.pieces, "incomplete" if cut else "completed")
        ended = resource.ended(part.event, self._output.items(), self._output.reasoning_tokens)
        return [*events, self._state("response.incomplete" if cut else "response.completed", ended)]

    def _state(self, kind: StateKind, response: Response) -> ResponseStateEvent:
        return {"type": kind, "sequence_number": self._number(), "response": response}


async def fitted(service: GenerationService, chat: ChatRequest) -> ChatRequest:
    """Return a chat that leaves its answer room: without as few of the first turns as possible.

    A turn begins where the user speaks; system messages before the first one stay. A conversation whose last
    turn is too long becomes that turn.

    Raises:
        Fault: the chat cannot be counted, for another reason than its length.
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
