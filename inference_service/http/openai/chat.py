"""``POST /v1/chat/completions``, and its answers: messages, or chunks of them."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Collection, Sequence
from contextlib import aclosing
from typing import Final

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from inference_service.chat.conversation import Conversation, Told
from inference_service.chat.pieces import CallArguments, CallBegun, Piece, Said, Thought
from inference_service.core.sequence import FinishReason, Token
from inference_service.http.openai.chat_schema import ChatBody
from inference_service.http.openai.logprobs import TokenNames, chat_logprobs, prompt_logprobs
from inference_service.http.openai.mapping import chat_of
from inference_service.http.wire.body import read_body
from inference_service.http.wire.reply import REASONS, Head, Json, Tally, ended_by, json_response, usage
from inference_service.http.wire.stream import open_stream, while_connected
from inference_service.serving.request import Delta, Finished, PromptLogprobs, Started
from inference_service.serving.service import GenerationService

REASONING: Final = ("reasoning_content", "reasoning")
"""Where reasoning stands, beside the content: both of vLLM's names, of which clients know one or the other."""
GOES_ON: Final[Json] = {"finish_reason": None, "stop_reason": None}


class ChatChoice:
    """Collects what a message consists of, or tells it in chunks."""

    def __init__(self, index: int, stops: Collection[str], names: TokenNames | None, *, ids: bool) -> None:
        """Begin an answer that stops may end.

        TokenNames are given where log probabilities are asked for, ids where token ids are.
        """
        self._ids: list[int] | None = [] if ids else None
        self._index = index
        self._stops = stops
        self._names = names
        self._said: list[str] = []
        self._thoughts: list[str] = []
        self._calls: list[Json] = []
        self._tokens: list[Token] = []
        self._ended = GOES_ON
        self._begun = False
        self._unread = 0
        """Tokens of which no piece has come yet."""
        self.reasoning_tokens = 0

    def take(self, delta: Delta, pieces: Sequence[Piece]) -> None:
        """Keep more of the answer, which says these pieces."""
        if self._names is not None:
            self._tokens += delta.tokens
        if self._ids is not None:
            self._ids += [token.id for token in delta.tokens]
        self._unread += len(delta.tokens)
        self._keep(pieces)

    def end(self, finished: Finished, pieces: Sequence[Piece]) -> None:
        """Keep the end of the answer."""
        self._keep(pieces)
        called = bool(self._calls) and finished.reason is FinishReason.STOP
        reason = "tool_calls" if called else REASONS[finished.reason]
        self._ended = {"finish_reason": reason, "stop_reason": ended_by(finished, self._stops)}

    def _keep(self, pieces: Sequence[Piece]) -> None:
        for piece in pieces:
            self.reasoning_tokens += self._unread if isinstance(piece, Thought) else 0
            self._unread = 0
            match piece:
                case Said():
                    self._said.append(piece.text)
                case Thought():
                    self._thoughts.append(piece.text)
                case CallBegun():
                    function = {"name": piece.name, "arguments": ""}
                    self._calls.append({"id": piece.id, "type": "function", "function": function})
                case CallArguments():
                    self._calls[piece.index]["function"]["arguments"] += piece.text

    def whole(self) -> Json:
        """Return the choice of an answer that is complete."""
        said = "".join(self._said)
        content = None if self._calls and not said.strip() else said
        message: Json = {"role": "assistant", "content": content, "refusal": None}
        if self._thoughts:
            message |= dict.fromkeys(REASONING, "".join(self._thoughts))
        if self._calls:
            message["tool_calls"] = self._calls
        scores = None if self._names is None else chat_logprobs(self._tokens, self._names)
        choice = {"index": self._index, "message": message, "logprobs": scores} | self._ended
        return choice if self._ids is None else choice | {"token_ids": self._ids}

    def chunks(self, delta: Delta, pieces: Sequence[Piece]) -> list[Json]:
        """Return the choices that tell more of the answer, the first of all with the role."""
        self.take(delta, pieces)
        scores = None if self._names is None else chat_logprobs(delta.tokens, self._names)
        if (scores or self._ids is not None) and not pieces:
            pieces = (Said(""),)
        chunks = [self._chunk(piece, scores if not nth else None) for nth, piece in enumerate(pieces)]
        if self._ids is not None:
            chunks[0]["token_ids"] = [token.id for token in delta.tokens]
        return self._opened(chunks)

    def last_chunks(self, finished: Finished, pieces: Sequence[Piece]) -> list[Json]:
        """Return the choices that tell the end, the very last with the reason."""
        self.end(finished, pieces)
        told = [self._chunk(piece, None) for piece in pieces]
        return self._opened([*told, self._choice({}, None, self._ended)])

    def _opened(self, chunks: list[Json]) -> list[Json]:
        if self._begun or not chunks:
            return chunks
        self._begun = True
        content = None if "tool_calls" in chunks[0]["delta"] else ""
        return [self._choice({"role": "assistant", "content": content, "refusal": None}, None), *chunks]

    def _chunk(self, piece: Piece, scores: Json | None) -> Json:
        match piece:
            case Said():
                return self._choice({"content": piece.text}, scores)
            case Thought():
                return self._choice(dict.fromkeys(REASONING, piece.text), scores)
            case CallBegun():
                function = {"name": piece.name, "arguments": ""}
                call = {"index": piece.index, "id": piece.id, "type": "function", "function": function}
            case CallArguments():
                call = {"index": piece.index, "function": {"arguments": piece.text}}
        return self._choice({"tool_calls": [call]}, scores)

    def _choice(self, delta: Json, scores: Json | None, ended: Json = GOES_ON) -> Json:
        choice = {"index": self._index, "delta": delta, "logprobs": scores} | ended
        return choice if self._ids is None else choice | {"token_ids": []}


async def chat_completions(service: GenerationService, http: HttpRequest) -> Response:
    """Answer a conversation."""
    body = await read_body(http, ChatBody)
    chat = Chat(service, body, Conversation(service, chat_of(body, http.headers)))
    if body.stream:
        return await open_stream(http.receive, chat.chunks(), chat.head)
    whole = await while_connected(http.receive, chat.whole())
    return json_response(whole, headers=chat.head.headers)


class Chat:
    """A conversation in the words of this route."""

    def __init__(self, service: GenerationService, body: ChatBody, conversation: Conversation) -> None:
        self._text = service.text
        """Of the model that answers, once that is known."""
        self._body = body
        self._conversation = conversation
        kind = "chat.completion.chunk" if body.stream else "chat.completion"
        self.head = Head(f"chatcmpl-{conversation.request.id}", kind, body.model)
        self._choices: list[ChatChoice] = []
        """Made when the request was accepted: before that, n is only a number that somebody sent."""

    def _begin(self, started: Started) -> Json:
        """Begin the answers; return what is told of the prompt."""
        self.head.begin(started)
        self._text = started.text
        names = TokenNames(started.text, bool(self._body.return_tokens_as_token_ids))
        scored = names if self._body.logprobs else None
        ids = bool(self._body.return_token_ids)
        indices = range(self._conversation.request.n)
        self._choices = [ChatChoice(index, self._body.stop, scored, ids=ids) for index in indices]
        return {"prompt_token_ids": started.prompt_token_ids} if ids else {}

    @property
    def _reasoning_tokens(self) -> int:
        return sum(choice.reasoning_tokens for choice in self._choices)

    async def whole(self) -> Json:
        """Return the answers at once."""
        prompt: Json = {}
        ends: list[Finished] = []
        async with aclosing(self._conversation.events()) as events:
            async for event in events:
                match event:
                    case Started():
                        prompt |= self._begin(event)
                    case PromptLogprobs():
                        prompt |= {"prompt_logprobs": prompt_logprobs(event.tokens, self._text)}
                    case Told(Delta() as delta, pieces):
                        self._choices[delta.index].take(delta, pieces)
                    case Told(Finished() as finished, pieces):
                        self._choices[finished.index].end(finished, pieces)
                        ends.append(finished)
        choices = [choice.whole() for choice in self._choices]
        return self.head.body(choices) | {"usage": usage(ends, self._reasoning_tokens)} | prompt

    async def chunks(self) -> AsyncGenerator[Json]:
        """Yield the answers as they come."""
        ends: list[Finished] = []
        tally = Tally()
        more: Json = {"usage": None} if self._body.include_usage else {}
        prompt: Json = {}
        """What is told of it, with the first chunk."""
        async with aclosing(self._conversation.events()) as events:
            async for event in events:
                choices: list[Json] = []
                tally.see(event.event if isinstance(event, Told) else event)
                match event:
                    case Started():
                        prompt |= self._begin(event)
                    case PromptLogprobs():
                        prompt |= {"prompt_logprobs": prompt_logprobs(event.tokens, self._text)}
                    case Told(Delta() as delta, pieces):
                        choices = self._choices[delta.index].chunks(delta, pieces)
                    case Told(Finished() as finished, pieces):
                        choices = self._choices[finished.index].last_chunks(finished, pieces)
                        ends.append(finished)
                for choice in choices:
                    if self._body.continuous_usage:
                        more["usage"] = tally.usage(choice["index"])
                    yield self.head.body([choice]) | more | prompt
                    prompt = {}
        if self._body.include_usage:
            yield self.head.body([]) | {"usage": usage(ends, self._reasoning_tokens)}
