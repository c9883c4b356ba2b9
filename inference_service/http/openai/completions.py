"""``POST /v1/completions``: plain prompts, and what evaluation harnesses ask."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from inference_service.core.sequence import Token
from inference_service.http.openai.completion_choice import CompletionChoice
from inference_service.http.openai.logprobs import Names, prompt_logprobs
from inference_service.http.openai.mapping import completion_requests
from inference_service.http.openai.merge import merged
from inference_service.http.openai.schema import CompletionBody
from inference_service.http.wire.body import read_body
from inference_service.http.wire.fields import in_words_of
from inference_service.http.wire.reply import Head, Json, Tally, json_response, usage
from inference_service.http.wire.stream import open_stream, while_connected
from inference_service.serving.request import Delta, Event, Finished, Pooled, PromptLogprobs, Request, Started
from inference_service.serving.service import GenerationService


async def completions(service: GenerationService, http: HttpRequest) -> Response:
    """Complete prompts."""
    body = await read_body(http, CompletionBody)
    with in_words_of(body):
        completion = Completion(service, body, completion_requests(body, service, http.headers))
        if body.stream:
            return await open_stream(http.receive, completion.chunks(), completion.head)
        whole = await while_connected(http.receive, completion.whole())
    return json_response(whole, headers=completion.head.headers)


class Completion:
    """One or more prompts and their answers; choice n * i + k is answer k to prompt i."""

    def __init__(self, service: GenerationService, body: CompletionBody, requests: list[Request]) -> None:
        self._service = service
        self._body = body
        self._requests = requests
        self._n = requests[0].n
        self.head = Head(f"cmpl-{requests[0].id}", "text_completion", body.model)
        self._choices: list[list[CompletionChoice]] = [[] for _ in requests]
        """By prompt; made when its request was accepted: before that, n is only a number that somebody sent."""
        self._prompts: list[tuple[int, ...]] = [() for _ in requests]
        """Their tokens."""
        self._text = service.text
        """Of the model that answers, once that is known."""
        self._ends: list[Finished] = []
        self._tallies = [Tally() for _ in requests]

    async def whole(self) -> Json:
        """Return the answers at once."""
        async with aclosing(self._told()) as told:
            async for _ in told:
                pass
        choices = [choice.whole() for answers in self._choices for choice in answers]
        return self.head.body(choices) | {"usage": usage(self._ends)}

    async def chunks(self) -> AsyncGenerator[Json]:
        """Yield the answers as they come."""
        more: Json = {"usage": None} if self._body.include_usage else {}
        async with aclosing(self._told()) as told:
            async for choice in told:
                if self._body.continuous_usage:
                    number, index = divmod(choice["index"], self._n)
                    more["usage"] = self._tallies[number].usage(index)
                yield self.head.body([choice]) | more
        if self._body.include_usage:
            yield self.head.body([]) | {"usage": usage(self._ends)}

    async def _told(self) -> AsyncGenerator[Json]:
        """Yield every choice that tells something new; one version answers all prompts."""
        if len(self._requests) > 1:
            served = await self._service.naming.choose(self._requests[0])
            self._requests = [replace(request, served=served) for request in self._requests]
        async with aclosing(merged([self._service.generate(request) for request in self._requests])) as events:
            async for number, event in events:
                for choice in self._tell(number, event):
                    yield choice

    def _tell(self, number: int, event: Event) -> list[Json]:
        self._tallies[number].see(event)
        match event:
            case Started():
                self._begin(number, event)
                scored = self._requests[number].sampling.prompt_logprobs is not None
                return [] if scored else self._echo(number, ())
            case PromptLogprobs():
                if self._body.prompt_logprobs is not None:
                    ranked = prompt_logprobs(event.tokens, self._text)
                    for choice in self._choices[number]:
                        choice.know({"prompt_logprobs": ranked})
                return self._echo(number, event.tokens)
            case Delta():
                return self._choices[number][event.index].take(event)
            case Pooled():
                return []
            case Finished():
                self._ends.append(event)
                return self._choices[number][event.index].end(event)

    def _begin(self, number: int, started: Started) -> None:
        self.head.begin(started)
        self._prompts[number] = started.prompt_token_ids
        self._text = started.text
        names = Names(started.text, bool(self._body.return_tokens_as_token_ids))
        scored = names if self._body.logprobs is not None else None
        indices = range(number * self._n, (number + 1) * self._n)
        ids = bool(self._body.return_token_ids)
        self._choices[number] = [CompletionChoice(index, self._body.stop, scored, ids=ids) for index in indices]
        for choice in self._choices[number] if ids else ():
            choice.know({"prompt_token_ids": started.prompt_token_ids})

    def _echo(self, number: int, tokens: Sequence[Token]) -> list[Json]:
        """Tell the prompt, where it is to be echoed; tokens are given where they have log probabilities."""
        if not self._body.echo:
            return []
        cut = self._body.truncate_prompt_tokens is not None
        prompt = self._prompts[number] if cut else self._body.prompt[number]
        said = prompt if isinstance(prompt, str) else self._text.decode(prompt)
        return [told for choice in self._choices[number] for told in choice.echo(said, tokens)]
