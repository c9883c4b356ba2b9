"""``POST /v1/chat/completions``."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from inference_service.chat.conversation import Conversation, Told
from inference_service.http.openai.chat_choice import ChatChoice
from inference_service.http.openai.chat_schema import ChatBody
from inference_service.http.openai.logprobs import Names, prompt_logprobs
from inference_service.http.openai.mapping import chat_of
from inference_service.http.wire.body import read_body
from inference_service.http.wire.reply import Head, Json, Tally, json_response, usage
from inference_service.http.wire.stream import open_stream, while_connected
from inference_service.serving.request import Delta, Finished, PromptLogprobs, Started
from inference_service.serving.service import GenerationService


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
        names = Names(started.text, bool(self._body.return_tokens_as_token_ids))
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
