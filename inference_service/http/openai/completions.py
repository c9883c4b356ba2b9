"""``POST /v1/completions``: plain prompts, and what evaluation harnesses ask."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Collection, Sequence
from contextlib import aclosing
from dataclasses import replace

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from inference_service.core.sequence import Token
from inference_service.http.openai.logprobs import TokenNames, legacy_logprobs, prompt_logprobs
from inference_service.http.openai.mapping import completion_requests
from inference_service.http.openai.schema import CompletionBody
from inference_service.http.wire.body import read_body
from inference_service.http.wire.fields import in_words_of
from inference_service.http.wire.reply import REASONS, Head, Json, Tally, ended_by, json_response, usage
from inference_service.http.wire.stream import open_stream, while_connected
from inference_service.serving.request import Delta, Event, Finished, Pooled, PromptLogprobs, Request, Started
from inference_service.serving.service import GenerationService


async def merged(streams: Sequence[AsyncGenerator[Event]]) -> AsyncGenerator[tuple[int, Event]]:
    """Yield the events of all streams, each with its stream's number, in the order in which they come.

    The first failure of one ends all; nothing runs on when this is closed.
    """
    arrived: asyncio.Queue[tuple[int, Event] | Exception | None] = asyncio.Queue()

    async def pump(number: int, stream: AsyncGenerator[Event]) -> None:
        try:
            async with aclosing(stream):
                async for event in stream:
                    arrived.put_nowait((number, event))
        except Exception as error:  # noqa: BLE001 - raised below, where somebody waits for it
            arrived.put_nowait(error)
        else:
            arrived.put_nowait(None)

    tasks = [asyncio.create_task(pump(number, stream)) for number, stream in enumerate(streams)]
    try:
        running = len(tasks)
        while running:
            item = await arrived.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                running -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class CompletionChoice:
    """Collects the text of an answer, or tells it in chunks."""

    def __init__(self, index: int, stops: Collection[str], names: TokenNames | None, *, ids: bool) -> None:
        """Begin an answer that stops may end.

        TokenNames are given where log probabilities are asked for, ids where token ids are.
        """
        self._index = index
        self._stops = stops
        self._ids: list[int] | None = [] if ids else None
        self._names = names
        self._said: list[str] = []
        self._tokens: list[Token] = []
        self._offset = 0
        """Characters of the tokens that were told in chunks."""
        self._reason: str | None = None
        self._ended_by: str | int | None = None
        self._prompt: Json = {}
        self._untold: Json = {}
        """Of the prompt, what was not told in a chunk yet."""

    def echo(self, prompt: str, tokens: Sequence[Token]) -> list[Json]:
        """Put the prompt before the answer; return the choice that tells it."""
        self._said.append(prompt)
        self._tokens += tokens
        return [self._chunk(prompt, tokens)]

    def know(self, prompt: Json) -> None:
        """Add what is to be told of the prompt, once: its tokens, or their scores."""
        self._prompt |= prompt
        self._untold |= prompt

    def take(self, delta: Delta) -> list[Json]:
        """Read more of the answer; return the choices that tell it."""
        self._said.append(delta.text)
        self._tokens += delta.tokens
        ids = [token.id for token in delta.tokens]
        if self._ids is not None:
            self._ids += ids
        told = delta.text or self._names is not None or self._ids is not None
        return [self._chunk(delta.text, delta.tokens, ids)] if told else []

    def end(self, finished: Finished) -> list[Json]:
        """Read the end of the answer; return the choices that tell it."""
        self._reason = REASONS[finished.reason]
        self._ended_by = ended_by(finished, self._stops)
        return [self._chunk("", ())]

    def whole(self) -> Json:
        """Return the choice of an answer that is complete."""
        self._offset = 0
        return self._choice("".join(self._said), self._tokens, self._ids or ()) | self._prompt

    def _chunk(self, said: str, tokens: Sequence[Token], ids: Sequence[int] = ()) -> Json:
        prompt, self._untold = self._untold, {}
        return self._choice(said, tokens, ids) | prompt

    def _choice(self, said: str, tokens: Sequence[Token], ids: Sequence[int]) -> Json:
        scores = None
        if self._names is not None and tokens:
            scores = legacy_logprobs(tokens, self._names, self._offset)
            self._offset += sum(len(self._names.text.token_text(token.id)) for token in tokens)
        choice = {"index": self._index, "text": said, "logprobs": scores, "finish_reason": self._reason}
        choice["stop_reason"] = self._ended_by
        return choice if self._ids is None else choice | {"token_ids": list(ids)}


async def completions(service: GenerationService, http: HttpRequest) -> Response:
    """Complete prompts."""
    body = await read_body(http, CompletionBody)
    with in_words_of(body):
        completion = CompletionAnswer(service, body, completion_requests(body, service, http.headers))
        if body.stream:
            return await open_stream(http.receive, completion.chunks(), completion.head)
        whole = await while_connected(http.receive, completion.whole())
    return json_response(whole, headers=completion.head.headers)


class CompletionAnswer:
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
        names = TokenNames(started.text, bool(self._body.return_tokens_as_token_ids))
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
