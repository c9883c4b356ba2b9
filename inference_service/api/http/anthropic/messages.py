"""``POST /v1/messages``, whole or as the events of a stream, and ``POST /v1/messages/count_tokens``."""

import time
from base64 import b64encode
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from functools import partial
from hashlib import sha256
from typing import Any, Final, cast

from pydantic_core import from_json
from starlette.requests import Request as HttpRequest

from inference_service.api.chat.conversation import AnswerPart, Conversation
from inference_service.api.chat.request import CallArguments, CallBegun, ChatRequest, Piece, TextPiece, Thought
from inference_service.api.http.anthropic.answers import (
    AnthropicMessage,
    ContentBlock,
    Ending,
    EventKind,
    MessageEvent,
    MessageUsage,
    StopReason,
    TokenCount,
)
from inference_service.api.http.anthropic.mapping import chat_of
from inference_service.api.http.anthropic.schema import CountBody, MessagesBody
from inference_service.api.http.wire.body import read_body
from inference_service.api.http.wire.refusals import fault_body
from inference_service.api.http.wire.reply import EventStream, Head, Reply, named, open_stream, while_connected
from inference_service.api.requests.service import GenerationService
from inference_service.core.request import WORDLESS, AnswerDelta, AnswerFinished, AnswerStarted, TokenUsage
from inference_service.core.sequence import EndReason
from loramux_shared.faults import PromptTooLong


def event_of(kind: EventKind, **fields: Any) -> MessageEvent:
    """Return an event of a stream."""
    return cast(MessageEvent, {"type": kind, **fields})


class Content:
    """Makes blocks of pieces, one after the other."""

    def __init__(self, *, shows_thinking: bool) -> None:
        """Begin an answer; where thinking is not shown, its blocks are empty."""
        self._shows_thinking = shows_thinking
        self.blocks: list[ContentBlock] = []
        """The blocks so far; the one that is open is still empty."""
        self._open: ContentBlock | None = None
        """The last block, while it continues."""
        self._texts: list[str] = []
        """The text of the open block so far."""
        self._space = ""
        """Space before a block of text that may come: no block consists of nothing else."""

    @property
    def calls(self) -> bool:
        """True when the answer calls something."""
        return any(block["type"] == "tool_use" for block in self.blocks)

    def take(self, pieces: Iterable[Piece]) -> list[MessageEvent]:
        """Return the events of more of the answer."""
        return [event for piece in pieces for event in self._take(piece)]

    def end(self) -> list[MessageEvent]:
        """Return the events of the end of the last block."""
        return self._close()

    def _take(self, piece: Piece) -> list[MessageEvent]:
        kind = self._open["type"] if self._open else ""
        match piece:
            case TextPiece() if kind == "text":
                return self._more(piece.text)
            case TextPiece():
                self._space += piece.text
                if not self._space.strip():
                    return []
                text = self._space
                return [*self._begin({"type": "text", "text": ""}), *self._more(text)]
            case Thought() if kind == "thinking":
                return self._more(piece.text)
            case Thought():
                begun = self._begin({"type": "thinking", "thinking": "", "signature": ""})
                return [*begun, *self._more(piece.text)]
            case CallBegun():
                return self._begin({"type": "tool_use", "id": piece.id, "name": piece.name, "input": {}})
            case CallArguments():
                return self._more(piece.text)

    def _begin(self, block: ContentBlock) -> list[MessageEvent]:
        closed = self._close()
        self._open, self._texts, self._space = block, [], ""
        self.blocks.append(block)
        # The event has a copy: it is written before the block has its text.
        return [*closed, event_of("content_block_start", index=self._index, content_block=block.copy())]

    def _more(self, text: str) -> list[MessageEvent]:
        self._texts.append(text)
        kind = self._open["type"] if self._open else ""
        if kind == "text":
            return [self._delta(type="text_delta", text=text)]
        if kind == "tool_use":
            return [self._delta(type="input_json_delta", partial_json=text)]
        return [self._delta(type="thinking_delta", thinking=text)] if self._shows_thinking else []

    def _close(self) -> list[MessageEvent]:
        if self._open is None:
            return []
        block, self._open = self._open, None
        text = "".join(self._texts)
        events: list[MessageEvent] = []
        if block["type"] == "tool_use":
            block["input"] = input_of(text)
        elif block["type"] == "text":
            block["text"] = text
        else:
            block["thinking"] = text if self._shows_thinking else ""
            block["signature"] = signature_of(text)
            events = [self._delta(type="signature_delta", signature=block["signature"])]
        return [*events, event_of("content_block_stop", index=self._index)]

    def _delta(self, **delta: str) -> MessageEvent:
        return event_of("content_block_delta", index=self._index, delta=delta)

    @property
    def _index(self) -> int:
        return len(self.blocks) - 1


def input_of(arguments: str) -> dict[str, Any]:
    """Return the input of a call as an object; a call that was cut off has the beginning of one.

    Text that is no object stands under the name that Anthropic's documentation has for it.
    """
    try:
        found = from_json(arguments or "{}", allow_partial=True)
    except ValueError:
        found = None
    return found if isinstance(found, dict) else {"INVALID_JSON": arguments}


def signature_of(thinking: str) -> str:
    """Return a digest of the thinking: clients want some signature, and nothing here is proved by it."""
    return b64encode(sha256(thinking.encode()).digest()).decode()


PING_S: Final = 10.0
"""Seconds without an event, though tokens come, after which a stream has a ping: a call may be held back until
it is whole."""
PING: Final = event_of("ping")
STOP: Final = event_of("message_stop")


class MessageAnswer:
    """One request and its answer."""

    def __init__(
        self, service: GenerationService, body: MessagesBody, chat: ChatRequest, ping_s: float = PING_S
    ) -> None:
        """Answer the conversation of a body; a stream without news has a ping after so many seconds."""
        self._service = service
        self._body = body
        self._ping_s = ping_s
        self._conversation = Conversation(service, chat)
        self.head = Head(f"msg_{self._conversation.request.id}", body.model)
        visible = body.thinking is None or body.thinking.display != "omitted"
        self._content = Content(shows_thinking=visible)
        self._prompt_tokens = 0
        self._finished: AnswerFinished | None = None
        self._unread = self._thinking = 0
        """Tokens since the last piece, and tokens of thinking."""

    async def whole(self) -> AnthropicMessage:
        """Return the answer at once.

        Raises:
            Fault: as `GenerationService.generate` does, with Anthropic's names.
        """
        async with aclosing(self._answers()) as answers:
            async for part in answers:
                self._read(part)
        finished = self._finished
        assert finished is not None  # noqa: S101 - an answer that did not fail ends
        message = self._message(self._content.blocks, self._usage(finished))
        return {**message, **self._ending(finished)}

    async def events(self) -> AsyncGenerator[MessageEvent]:
        """Yield the events of a stream; the first comes with the first text.

        Raises:
            Fault: as `whole` does.
        """
        begun, last_s = False, 0.0
        async with aclosing(self._answers()) as answers:
            async for part in answers:
                events = self._read(part)
                if not (begun or events or self._unread > WORDLESS):
                    continue
                if not begun:
                    begun = True
                    events = [self._started(), PING, *events]
                if not events and time.monotonic() - last_s > self._ping_s:
                    events = [PING]
                if events:
                    last_s = time.monotonic()
                for event in events:
                    yield event

    async def _answers(self) -> AsyncGenerator[AnswerPart]:
        """Yield more of the answer, or its end; what comes before it is noted."""
        try:
            async with aclosing(self._conversation.events()) as events:
                async for event in events:
                    if isinstance(event, AnswerStarted):
                        self.head.begin(event)
                        self._prompt_tokens = event.prompt_tokens
                    elif isinstance(event, AnswerPart):
                        yield event
        except PromptTooLong as fault:
            raise await self._too_long() from fault

    def _read(self, part: AnswerPart) -> list[MessageEvent]:
        """Collect more of the answer, or its end; return the events that a stream has of it."""
        if isinstance(part.event, AnswerDelta):
            self._unread += len(part.event.tokens)
        if part.pieces:
            self._thinking += self._unread * isinstance(part.pieces[0], Thought)
            self._unread = 0
        events: list[MessageEvent] = [*self._content.take(part.pieces)]
        if isinstance(part.event, AnswerFinished):
            self._finished = part.event
            events += [*self._content.end(), self._ended(part.event), STOP]
        return events

    def _message(self, content: list[ContentBlock], usage: MessageUsage) -> AnthropicMessage:
        return {
            "id": self.head.id,
            "type": "message",
            "role": "assistant",
            "model": self.head.model,
            "content": content,
            "stop_reason": None,
            "stop_sequence": None,
            "usage": usage,
        }

    def _started(self) -> MessageEvent:
        """Return the first event; the last but one says how much of the prompt was cached."""
        counted = usage(TokenUsage(self._prompt_tokens))
        return event_of("message_start", message=self._message([], counted))

    def _ended(self, finished: AnswerFinished) -> MessageEvent:
        return event_of("message_delta", delta=self._ending(finished), usage=self._usage(finished))

    def _usage(self, finished: AnswerFinished) -> MessageUsage:
        counted = usage(finished.usage)
        if self._thinking:
            counted["output_tokens_details"] = {"thinking_tokens": self._thinking}
        return counted

    def _ending(self, finished: AnswerFinished) -> Ending:
        stop = finished.stop_text if finished.stop_text in (self._body.stop_sequences or ()) else None
        reason: StopReason = "tool_use" if self._content.calls else "end_turn"
        if stop:
            reason = "stop_sequence"
        elif finished.reason is EndReason.LENGTH:
            reason = "max_tokens"
        return {"stop_reason": reason, "stop_sequence": stop}

    async def _too_long(self) -> PromptTooLong:
        """Return the fault of a prompt that does not fit, in the words from which clients learn by how much."""
        most, new_tokens = self._service.limits.max_seq_len, self._body.max_tokens
        try:
            tokens = await self._conversation.prompt_tokens()
        except PromptTooLong as fault:
            return PromptTooLong(f"prompt is too long: {fault.message}")
        if tokens >= most:
            return PromptTooLong(f"prompt is too long: {tokens} tokens > {most - 1} maximum")
        return PromptTooLong(
            f"input length and `max_tokens` exceed context limit: {tokens} + {new_tokens} > {most}, "
            "decrease input length or `max_tokens` and try again"
        )


def usage(tokens: TokenUsage) -> MessageUsage:
    """Return the tokens of a prompt, without those that were found in the cache, and of its answer."""
    return {
        "input_tokens": tokens.prompt_tokens - tokens.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": tokens.cached_tokens,
        "output_tokens": tokens.completion_tokens,
    }


async def create_message(
    service: GenerationService, http: HttpRequest
) -> Reply[AnthropicMessage] | EventStream[MessageEvent]:
    """Answer a conversation in Anthropic's form."""
    body = await read_body(http, MessagesBody)
    answer = MessageAnswer(service, body, chat_of(body, http.headers))
    if body.stream:
        framing = named(partial(fault_body, http.scope))
        return await open_stream(http.receive, answer.events(), answer.head, framing)
    whole = await while_connected(http.receive, answer.whole())
    return Reply(whole, headers=answer.head.headers)


async def count_tokens(service: GenerationService, http: HttpRequest) -> Reply[TokenCount]:
    """Count the tokens of a conversation's prompt."""
    chat = chat_of(await read_body(http, CountBody), http.headers)
    tokens = await Conversation(service, chat).prompt_tokens()
    return Reply({"input_tokens": tokens})
