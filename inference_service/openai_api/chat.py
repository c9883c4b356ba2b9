"""``POST /v1/chat/completions``."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from inference_service.openai_api.body import read_body
from inference_service.openai_api.chat_choice import ChatChoice
from inference_service.openai_api.chat_schema import ChatBody
from inference_service.openai_api.forced_call import ForcedCall
from inference_service.openai_api.logprobs import prompt_logprobs
from inference_service.openai_api.mapping import chat_request, is_forced, offered_tools
from inference_service.openai_api.pieces import Plain, Reading
from inference_service.openai_api.reply import Head, Json, Tally, json_response, usage
from inference_service.openai_api.stream import open_stream, while_connected
from inference_service.openai_api.tagged_calls import TaggedCalls
from inference_service.serving.request import Delta, Finished, PromptLogprobs, Request, Started
from inference_service.serving.service import GenerationService


async def chat_completions(service: GenerationService, http: HttpRequest) -> Response:
    """Answer a conversation."""
    body = await read_body(http, ChatBody)
    chat = Chat(service, body, chat_request(body, http.headers))
    if body.stream:
        return await open_stream(http.receive, chat.chunks(), chat.head)
    whole = await while_connected(http.receive, chat.whole())
    return json_response(whole, headers=chat.head.headers)


class Chat:
    """One request and its answers."""

    def __init__(self, service: GenerationService, body: ChatBody, request: Request) -> None:
        self._service = service
        self._body = body
        self._request = request
        kind = "chat.completion.chunk" if body.stream else "chat.completion"
        self.head = Head(f"chatcmpl-{request.id}", kind, body.model)
        self._choices: list[ChatChoice] = []
        """Made when the request was accepted: before that, n is only a number that somebody sent."""

    def _begin(self, started: Started) -> Json:
        """Begin the answers; return what is told of the prompt."""
        self.head.begin(started)
        text = self._service.text if self._body.logprobs else None
        ids = bool(self._body.return_token_ids)
        self._choices = [
            ChatChoice(index, self._reading(), self._body.stop, text, ids=ids)
            for index in range(self._request.n)
        ]
        return {"prompt_token_ids": started.prompt_token_ids} if ids else {}

    def _reading(self) -> Reading:
        if is_forced(self._body):
            return ForcedCall()
        names = {tool.function.name for tool in offered_tools(self._body)}
        return TaggedCalls(names) if names else Plain()

    async def whole(self) -> Json:
        """Return the answers at once."""
        prompt: Json = {}
        ends: list[Finished] = []
        async with aclosing(self._service.generate(self._request)) as events:
            async for event in events:
                match event:
                    case Started():
                        prompt |= self._begin(event)
                    case PromptLogprobs():
                        prompt |= {"prompt_logprobs": prompt_logprobs(event.tokens, self._service.text)}
                    case Delta():
                        self._choices[event.index].take(event)
                    case Finished():
                        self._choices[event.index].end(event)
                        ends.append(event)
        choices = [choice.whole() for choice in self._choices]
        return self.head.body(choices) | {"usage": usage(ends)} | prompt

    async def chunks(self) -> AsyncGenerator[Json]:
        """Yield the answers as they come."""
        ends: list[Finished] = []
        tally = Tally()
        more: Json = {"usage": None} if self._body.include_usage else {}
        prompt: Json = {}
        """What is told of it, with the first chunk."""
        async with aclosing(self._service.generate(self._request)) as events:
            async for event in events:
                choices: list[Json] = []
                tally.see(event)
                match event:
                    case Started():
                        prompt |= self._begin(event)
                    case PromptLogprobs():
                        prompt |= {"prompt_logprobs": prompt_logprobs(event.tokens, self._service.text)}
                    case Delta():
                        choices = self._choices[event.index].chunks(event)
                    case Finished():
                        choices = self._choices[event.index].last_chunks(event)
                        ends.append(event)
                for choice in choices:
                    if self._body.continuous_usage:
                        more["usage"] = tally.usage(choice["index"])
                    yield self.head.body([choice]) | more | prompt
                    prompt = {}
        if self._body.include_usage:
            yield self.head.body([]) | {"usage": usage(ends)}
