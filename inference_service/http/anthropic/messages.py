"""``POST /v1/messages``, whole or as the events of a stream, and ``POST /v1/messages/count_tokens``."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial
from typing import Final

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from inference_service.chat.conversation import Conversation, Told
from inference_service.chat.pieces import Thought
from inference_service.chat.request import ChatRequest
from inference_service.core.sequence import FinishReason
from inference_service.http.anthropic.content import Content
from inference_service.http.anthropic.mapping import chat_of
from inference_service.http.anthropic.schema import CountBody, MessagesBody
from inference_service.http.wire.body import read_body
from inference_service.http.wire.refusals import fault_body
from inference_service.http.wire.reply import Head, Json, json_response
from inference_service.http.wire.stream import named, open_stream, while_connected
from inference_service.serving.request import WORDLESS, Delta, Finished, Started
from inference_service.serving.service import GenerationService
from loramux_shared.faults import PromptTooLong

PING_S: Final = 10.0
"""A stream in which nothing is told for so long, though tokens come, says that it is alive: a call may be held
back until it is whole."""
PING: Final[Json] = {"type": "ping"}


class MessageAnswer:
    """One request and its answer."""

    def __init__(
        self,
        service: GenerationService,
        body: MessagesBody,
        chat: ChatRequest,
        ping_s: float = PING_S,
    ) -> None:
        """Answer the conversation of a body; a stream without news has a ping after so many seconds."""
        self._service = service
        self._body = body
        self._ping_s = ping_s
        self._conversation = Conversation(service, chat)
        self.head = Head(f"msg_{self._conversation.request.id}", "message", body.model)
        shown = body.thinking is None or body.thinking.display != "omitted"
        self._content = Content(shows_thinking=shown)
        self._unread = self._thinking = 0
        """Tokens of which no piece has come yet, and tokens of what was thought."""

    async def whole(self) -> Json:
        """Return the answer at once.

        Raises:
            Fault: as `GenerationService.generate` does, with Anthropic's names.
        """
        ended: Json = {}
        async with aclosing(self._events()) as events:
            async for event in events:
                if isinstance(event, Started):
                    self.head.begin(event)
                    continue
                self._take(event)
                if isinstance(event.event, Finished):
                    self._content.end()
                    ended = self._ended(event.event) | {"usage": self._usage(event.event)}
        return self._message(self._content.blocks) | ended

    async def events(self) -> AsyncGenerator[Json]:
        """Yield the events of a stream; the first comes with the first text.

        Raises:
            Fault: as `whole` does.
        """
        begun, prompt_tokens, told_s = False, 0, 0.0
        async with aclosing(self._events()) as events:
            async for event in events:
                if isinstance(event, Started):
                    self.head.begin(event)
                    prompt_tokens = event.prompt_tokens
                    continue
                news = self._take(event)
                if not (begun or news or self._unread > WORDLESS or isinstance(event.event, Finished)):
                    continue
                if not begun:
                    begun = True
                    news = [self._started(prompt_tokens), PING, *news]
                if isinstance(event.event, Finished):
                    news += [*self._content.end(), self._stopped(event.event), {"type": "message_stop"}]
                if not news and time.monotonic() - told_s > self._ping_s:
                    news = [PING]
                if news:
                    told_s = time.monotonic()
                for each in news:
                    yield each

    async def _events(self) -> AsyncGenerator[Started | Told]:
        try:
            async with aclosing(self._conversation.events()) as events:
                async for event in events:
                    if isinstance(event, Started | Told):
                        yield event
        except PromptTooLong as fault:
            raise await self._too_long() from fault

    def _take(self, told: Told) -> list[Json]:
        """Return the events that tell more of the answer; count what was thought."""
        if isinstance(told.event, Delta):
            self._unread += len(told.event.tokens)
        if told.pieces:
            self._thinking += self._unread * isinstance(told.pieces[0], Thought)
            self._unread = 0
        return self._content.take(told.pieces)

    def _message(self, content: list[Json]) -> Json:
        return {
            "id": self.head.id,
            "type": "message",
            "role": "assistant",
            "model": self.head.model,
            "content": content,
            "stop_reason": None,
            "stop_sequence": None,
        }

    def _started(self, prompt_tokens: int) -> Json:
        """Return the first event; how much of the prompt was cached is told with the last but one."""
        counted = usage(Finished(FinishReason.STOP, "", prompt_tokens, 0, 0))
        return {"type": "message_start", "message": self._message([]) | {"usage": counted}}

    def _stopped(self, finished: Finished) -> Json:
        return {"type": "message_delta", "delta": self._ended(finished), "usage": self._usage(finished)}

    def _usage(self, finished: Finished) -> Json:
        thought = {"output_tokens_details": {"thinking_tokens": self._thinking}} if self._thinking else {}
        return usage(finished) | thought

    def _ended(self, finished: Finished) -> Json:
        stop = finished.stop_text if finished.stop_text in (self._body.stop_sequences or ()) else None
        if stop:
            reason = "stop_sequence"
        elif finished.reason is FinishReason.LENGTH:
            reason = "max_tokens"
        else:
            reason = "tool_use" if self._content.calls else "end_turn"
        return {"stop_reason": reason, "stop_sequence": stop}

    async def _too_long(self) -> PromptTooLong:
        """Return the fault of a prompt that does not fit, in the words from which clients learn by how much."""
        most, wanted = self._service.limits.max_seq_len, self._body.max_tokens
        try:
            tokens = await self._conversation.prompt_tokens()
        except PromptTooLong as fault:
            return PromptTooLong(f"prompt is too long: {fault.message}")
        if tokens >= most:
            return PromptTooLong(f"prompt is too long: {tokens} tokens > {most - 1} maximum")
        return PromptTooLong(
            f"input length and `max_tokens` exceed context limit: {tokens} + {wanted} > {most}, "
            "decrease input length or `max_tokens` and try again"
        )


def usage(finished: Finished) -> Json:
    """Return the tokens of a prompt, without those that were found in the cache, and of its answer."""
    return {
        "input_tokens": finished.prompt_tokens - finished.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": finished.cached_tokens,
        "output_tokens": finished.completion_tokens,
    }


async def create_message(service: GenerationService, http: HttpRequest) -> Response:
    """Answer a conversation, as Anthropic's API has it."""
    body = await read_body(http, MessagesBody)
    answer = MessageAnswer(service, body, chat_of(body, http.headers))
    if body.stream:
        framing = named(partial(fault_body, http.scope))
        return await open_stream(http.receive, answer.events(), answer.head, framing)
    whole = await while_connected(http.receive, answer.whole())
    return json_response(whole, headers=answer.head.headers)


async def count_tokens(service: GenerationService, http: HttpRequest) -> Response:
    """Count the tokens of a conversation's prompt."""
    chat = chat_of(await read_body(http, CountBody), http.headers)
    tokens = await Conversation(service, chat).prompt_tokens()
    return json_response({"input_tokens": tokens})
