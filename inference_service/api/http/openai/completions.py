"""``POST /v1/completions``: plain prompts, and what evaluation harnesses ask."""

import asyncio
from collections.abc import AsyncGenerator, Collection, Sequence
from contextlib import aclosing

from starlette.requests import Request as HttpRequest

from inference_service.api.http.openai.answers import (
    REASONS,
    Completion,
    CompletionChunk,
    Ended,
    PlainAnswer,
    PlainAnswerPart,
    PromptPart,
    Tally,
    ended_by,
    usage,
)
from inference_service.api.http.openai.logprobs import TokenNames, legacy_logprobs, prompt_logprobs
from inference_service.api.http.openai.mapping import completion_requests
from inference_service.api.http.openai.schema import CompletionBody
from inference_service.api.http.wire.body import in_words_of, read_body
from inference_service.api.http.wire.reply import (
    EventStream,
    Head,
    Reply,
    TextEvent,
    encoded,
    open_stream,
    sink_of,
    while_connected,
)
from inference_service.api.requests.service import GenerationService
from inference_service.core.request import (
    AnswerDelta,
    AnswerFinished,
    AnswerStarted,
    Event,
    Pooled,
    PromptScores,
    Request,
)
from inference_service.core.sequence import Token
from inference_service.driver.delivery import Sink


async def merged(streams: Sequence[AsyncGenerator[Event]]) -> AsyncGenerator[tuple[int, Event]]:
    """Yield the events of all streams, each with its stream's number, in the order in which they come.

    The first failure of one ends all; nothing runs on when this is closed.
    """
    if len(streams) == 1:
        async with aclosing(streams[0]) as only:
            async for event in only:
                yield 0, event
        return
    arrived: asyncio.Queue[tuple[int, Event] | Exception | None] = asyncio.Queue()

    async def pump(number: int, stream: AsyncGenerator[Event]) -> None:
        try:
            async with aclosing(stream):
                async for event in stream:
                    arrived.put_nowait((number, event))
        except Exception as error:  # noqa: BLE001 - raised below, to the caller
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
    """One of the answers to one of the prompts: collects its text, and writes the chunks of a stream."""

    def __init__(self, index: int, stops: Collection[str], names: TokenNames | None, *, ids: bool) -> None:
        """Begin an answer that stops may end.

        Log probabilities are written where TokenNames are given, and token ids where `ids` is true.
        """
        self._index = index
        self._stops = stops
        self._ids: list[int] | None = [] if ids else None
        self._names = names
        self._texts: list[str] = []
        self._tokens: list[Token] = []
        self._offset = 0
        """Characters of the tokens in the chunks so far."""
        self._finish_reason: Ended | None = None
        self._stop_reason: str | int | None = None
        self._prompt: PromptPart = {}
        """Report about the prompt in the answer."""
        self._in_next: PromptPart = {}
        """Part of it in the next chunk."""

    def echo(self, prompt: str, tokens: Sequence[Token]) -> list[PlainAnswerPart]:
        """Put the prompt before the answer; return its choice in a chunk."""
        self._texts.append(prompt)
        self._tokens += tokens
        return [self._part(prompt, tokens)]

    def know(self, prompt: PromptPart) -> None:
        """Add a field about the prompt, which is written once: its tokens, or their scores."""
        self._prompt.update(prompt)
        self._in_next.update(prompt)

    def take(self, delta: AnswerDelta) -> list[PlainAnswerPart]:
        """Collect more of the answer; return its choice in a chunk, if it has content."""
        self._texts.append(delta.text)
        self._tokens += delta.tokens
        ids = [token.id for token in delta.tokens]
        if self._ids is not None:
            self._ids += ids
        tells = delta.text or self._names is not None or self._ids is not None
        return [self._part(delta.text, delta.tokens, ids)] if tells else []

    def text_alone(self, delta: AnswerDelta) -> str | None:
        """Return the text of a delta whose chunk differs from others in its text alone."""
        plain = self._names is None and self._ids is None and not self._in_next
        return delta.text if plain and delta.text else None

    def text_part(self, text: str) -> PlainAnswerPart:
        """Return the choice of more text in a chunk."""
        return self._choice(text, (), ())

    def end(self, finished: AnswerFinished) -> list[PlainAnswerPart]:
        """Note the end of the answer; return its choice in a chunk."""
        self._finish_reason = REASONS[finished.reason]
        self._stop_reason = ended_by(finished, self._stops)
        return [self._part("", ())]

    def whole(self) -> PlainAnswer:
        """Return the choice of an answer that has ended."""
        assert self._finish_reason is not None  # noqa: S101 - every answer of a request that did not fail ends
        self._offset = 0
        choice = self._choice("".join(self._texts), self._tokens, self._ids or ())
        return {**choice, "finish_reason": self._finish_reason, **self._prompt}

    def _part(self, text: str, tokens: Sequence[Token], ids: Sequence[int] = ()) -> PlainAnswerPart:
        prompt, self._in_next = self._in_next, {}
        return {**self._choice(text, tokens, ids), **prompt}

    def _choice(self, text: str, tokens: Sequence[Token], ids: Sequence[int]) -> PlainAnswerPart:
        scores = None
        if self._names is not None and tokens:
            scores = legacy_logprobs(tokens, self._names, self._offset)
            self._offset += sum(len(self._names.text.token_text(token.id)) for token in tokens)
        choice: PlainAnswerPart = {
            "index": self._index,
            "text": text,
            "logprobs": scores,
            "finish_reason": self._finish_reason,
            "stop_reason": self._stop_reason,
        }
        if self._ids is not None:
            choice["token_ids"] = list(ids)
        return choice


async def completions(
    service: GenerationService, http: HttpRequest
) -> Reply[Completion] | EventStream[CompletionChunk]:
    """Complete prompts."""
    body = await read_body(http, CompletionBody)
    with in_words_of(body):
        completion = CompletionAnswer(service, body, completion_requests(body, service, http.headers))
        if body.stream:
            return await open_stream(http.receive, completion.chunks(http), completion.head)
        whole = await while_connected(http.receive, completion.whole())
    return Reply(whole, headers=completion.head.headers)


class CompletionAnswer:
    """One or more prompts and their answers; choice n * i + k is answer k to prompt i."""

    def __init__(self, service: GenerationService, body: CompletionBody, requests: list[Request]) -> None:
        self._service = service
        self._body = body
        self._requests = requests
        self._n = requests[0].output.n
        self.head = Head(f"cmpl-{requests[0].id}", body.model)
        self._choices: list[list[CompletionChoice]] = [[] for _ in requests]
        """Choices by prompt; made when its request was accepted: before that, n is only a client's number."""
        self._prompts: list[tuple[int, ...]] = [() for _ in requests]
        """Their tokens."""
        self._text = service.text
        """The text side of the model that answers; the base's until that is known."""
        self._ends: list[AnswerFinished] = []
        self._tallies = [Tally() for _ in requests]
        self._texts: dict[int, TextEvent] = {}
        """Events with text, by the answer's index."""

    async def whole(self) -> Completion:
        """Return the answers at once."""
        async with aclosing(await self._events()) as events:
            async for number, event in events:
                self._read(number, event)
        return {
            "id": self.head.id,
            "object": "text_completion",
            "created": self.head.created,
            "model": self.head.model,
            "system_fingerprint": self.head.fingerprint,
            "choices": [choice.whole() for answers in self._choices for choice in answers],
            "usage": usage(self._ends),
        }

    async def chunks(self, http: HttpRequest) -> AsyncGenerator[CompletionChunk]:
        """Yield the answers in chunks as they are generated, but for those that are written at once."""
        async with aclosing(await self._events(sink_of(http, self._written))) as events:
            async for number, event in events:
                for part in self._read(number, event):
                    yield self._chunk_of(part)
        if self._body.include_usage:
            yield {**self._chunk([]), "usage": usage(self._ends)}

    def _written(self, delta: AnswerDelta) -> bytes:
        choice = self._choices[0][delta.index]
        if self._body.continuous_usage or (text := choice.text_alone(delta)) is None:
            return encoded(map(self._chunk_of, self._read(0, delta)))
        if delta.index not in self._texts:
            self._texts[delta.index] = TextEvent(lambda text: self._chunk_of(choice.text_part(text)))
        return self._texts[delta.index].of(text)

    def _chunk_of(self, part: PlainAnswerPart) -> CompletionChunk:
        chunk = self._chunk([part])
        if self._body.continuous_usage:
            number, index = divmod(part["index"], self._n)
            chunk["usage"] = self._tallies[number].usage(index)
        elif self._body.include_usage:
            chunk["usage"] = None
        return chunk

    def _chunk(self, choices: list[PlainAnswerPart]) -> CompletionChunk:
        return {
            "id": self.head.id,
            "object": "text_completion",
            "created": self.head.created,
            "model": self.head.model,
            "system_fingerprint": self.head.fingerprint,
            "choices": choices,
        }

    async def _events(self, sink: Sink[AnswerDelta] | None = None) -> AsyncGenerator[tuple[int, Event]]:
        """Return the events of all answers; one version answers all prompts.

        A sink takes deltas of a single prompt: those of several wait for each other in `merged`.
        """
        if len(self._requests) > 1:
            served = await self._service.choose(self._requests[0])
            self._requests = [request.answered_by(served) for request in self._requests]
        alone = sink if len(self._requests) == 1 else None
        return merged([self._service.generate(request, alone) for request in self._requests])

    def _read(self, number: int, event: Event) -> list[PlainAnswerPart]:
        """Read an event of a prompt; return its choices."""
        self._tallies[number].see(event)
        match event:
            case AnswerStarted():
                self._begin(number, event)
                scored = self._requests[number].sampling.prompt_logprobs is not None
                return [] if scored else self._echo(number, ())
            case PromptScores():
                if self._body.prompt_logprobs is not None:
                    ranked = prompt_logprobs(event.tokens, self._text)
                    for choice in self._choices[number]:
                        choice.know({"prompt_logprobs": ranked})
                return self._echo(number, event.tokens)
            case AnswerDelta():
                return self._choices[number][event.index].take(event)
            case Pooled():
                return []
            case AnswerFinished():
                self._ends.append(event)
                return self._choices[number][event.index].end(event)

    def _begin(self, number: int, started: AnswerStarted) -> None:
        self.head.begin(started)
        self._prompts[number] = started.prompt_token_ids
        self._text = started.text
        names = TokenNames(started.text, bool(self._body.return_tokens_as_token_ids))
        scored = names if self._body.logprobs is not None else None
        indices = range(number * self._n, (number + 1) * self._n)
        ids = bool(self._body.return_token_ids)
        self._choices[number] = [CompletionChoice(index, self._body.stop, scored, ids=ids) for index in indices]
        for choice in self._choices[number] if ids else ():
            choice.know({"prompt_token_ids": list(started.prompt_token_ids)})

    def _echo(self, number: int, tokens: Sequence[Token]) -> list[PlainAnswerPart]:
        """Return the prompt, if it is echoed; tokens are given where they have log probabilities."""
        if not self._body.echo:
            return []
        cut = self._body.truncate_prompt_tokens is not None
        prompt = self._prompts[number] if cut else self._body.prompt[number]
        text = prompt if isinstance(prompt, str) else self._text.decode(prompt)
        return [part for choice in self._choices[number] for part in choice.echo(text, tokens)]
