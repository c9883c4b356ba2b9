"""``POST /v1/responses``: items in, items out, whole or in events."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import Final

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from inference_service.chat.conversation import Conversation, Told
from inference_service.chat.request import ChatRequest
from inference_service.core.sequence import FinishReason
from inference_service.http.responses.mapping import chat_of
from inference_service.http.responses.output import OutputItems, Status
from inference_service.http.responses.resource import Resource
from inference_service.http.responses.schema import ResponsesBody
from inference_service.http.responses.tools import functions_of
from inference_service.http.wire.body import read_body
from inference_service.http.wire.errors import error_body
from inference_service.http.wire.reply import DONE, Head, Json, json_response, named_event
from inference_service.http.wire.stream import Framing, open_stream, while_connected
from inference_service.serving.request import Delta, Finished, Started
from inference_service.serving.service import GenerationService
from loramux_shared.faults import Fault, PromptTooLong

FRAMING: Final = Framing(named_event, error_body, DONE)
"""A fault is an event of its own, made here; ``[DONE]`` is always the end."""


async def create_response(service: GenerationService, http: HttpRequest) -> Response:
    """Answer items with items."""
    body = await read_body(http, ResponsesBody)
    chat = chat_of(body, http.headers)
    if body.truncation == "auto":
        chat = await while_connected(http.receive, fitted(service, chat))
    answer = ResponseAnswer(service, body, Conversation(service, chat))
    if body.stream:
        return await open_stream(http.receive, answer.events(), answer.head, FRAMING)
    whole = await while_connected(http.receive, answer.whole())
    return json_response(whole, headers=answer.head.headers)


async def count_input(service: GenerationService, http: HttpRequest) -> Response:
    """Count the tokens of what would be answered."""
    body = await read_body(http, ResponsesBody)
    tokens = await Conversation(service, chat_of(body, http.headers)).prompt_tokens()
    return json_response({"object": "response.input_tokens", "input_tokens": tokens})


class ResponseAnswer:
    """A conversation in the words of this route."""

    def __init__(self, service: GenerationService, body: ResponsesBody, conversation: Conversation) -> None:
        self._service = service
        self._body = body
        self._conversation = conversation
        self._output = OutputItems(None, (), carries=body.carries)
        self.head = Head(f"resp_{self._conversation.request.id}", "response", body.model)
        self._resource: Resource | None = None
        """Known when the request was accepted."""

    async def whole(self) -> Json:
        """Return the response at once.

        Raises:
            Fault: it failed.
        """
        last: Json = {}
        async with aclosing(self._told()) as told:
            async for event in told:
                last = event
        response: Json = last["response"]
        return response

    async def events(self) -> AsyncGenerator[Json]:
        """Yield the events of the response; the first with the first token, the last tells how it ended.

        Raises:
            Fault: it failed before the first event.
        """
        number = 0
        try:
            async with aclosing(self._told()) as told:
                async for event in told:
                    yield _numbered(event, number)
                    number += 1
        except Fault as fault:
            if self._resource is None or not number:
                raise
            failed = self._resource.failed(fault, self._output.items())
            yield _numbered({"type": "response.failed", "response": failed}, number)

    async def _told(self) -> AsyncGenerator[Json]:
        begun = False
        async with aclosing(self._conversation.events()) as events:
            async for event in events:
                match event:
                    case Started():
                        self._resource = await self._begin(event)
                    case Told() if self._resource is not None:
                        if not begun:
                            begun = True
                            for kind in ("created", "in_progress"):
                                yield {"type": f"response.{kind}", "response": self._resource.under_way()}
                        for told in self._tell(self._resource, event):
                            yield told

    async def _begin(self, started: Started) -> Resource:
        self.head.begin(started)
        scored = None if self._body.logprobs is None else started.text
        self._output = OutputItems(scored, functions_of(self._body.tools), carries=self._body.carries)
        return Resource(self._body, self.head, await self._service.naming.defaults(started.model))

    def _tell(self, resource: Resource, told: Told) -> list[Json]:
        match told.event:
            case Delta() as delta:
                return self._output.take(told.pieces, delta.tokens)
            case Finished() as finished:
                status: Status = "incomplete" if finished.reason is FinishReason.LENGTH else "completed"
                events = self._output.end(told.pieces, status)
                ended = resource.ended(finished, self._output.items(), self._output.reasoning_tokens)
                return [*events, {"type": f"response.{status}", "response": ended}]


def _numbered(event: Json, number: int) -> Json:
    return {"type": event["type"], "sequence_number": number} | event


async def fitted(service: GenerationService, chat: ChatRequest) -> ChatRequest:
    """Return a chat that leaves its answer room: without as many of the first turns as it takes, and no more.

    A turn begins where the user speaks; system messages before the first one stay. Of a conversation whose last
    turn is too long, that is returned.

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
