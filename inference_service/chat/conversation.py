"""A chat between its request and its answers: what the model's dialect makes of both."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import Final, NamedTuple

from inference_service.chat.demands import ConstraintAt, Demand
from inference_service.chat.dialect import Dialect, dialect_of
from inference_service.chat.formats.lark import OfferedTool
from inference_service.chat.formats.reading import ThinkingMarks
from inference_service.chat.request import (
    ANY_ARGUMENTS,
    AnswerCalls,
    AnswerReader,
    CallArguments,
    CallBegun,
    ChatRequest,
    ChatTool,
    Piece,
    TextPiece,
    Thought,
    naming,
)
from inference_service.core.constraint import ByEnding
from inference_service.serving.delivery import Sink
from inference_service.serving.request import (
    AnswerDelta,
    AnswerFinished,
    AnswerStarted,
    Message,
    PromptScores,
    Request,
)
from inference_service.serving.service import GenerationService
from inference_service.text.text import Text
from loramux_shared.runtime import ReasoningParser, ToolParser

UNKNOWN: Final = Dialect(ToolParser.AUTO, ReasoningParser.AUTO)


class AnswerPart(NamedTuple):
    """More of an answer, or its end, and what that says."""

    event: AnswerDelta | AnswerFinished
    pieces: list[Piece]


class Conversation:
    """One request and its n answers; faults name fields as the client does."""

    def __init__(self, service: GenerationService, chat: ChatRequest) -> None:
        self._service = service
        self._chat = chat
        self._tools = chat.callable_tools
        self._dialect = UNKNOWN
        """Dialect of the model that answers, once that is known."""
        self.request = chat.request()

    async def events(
        self, sink: Sink[AnswerPart] | None = None
    ) -> AsyncGenerator[AnswerStarted | PromptScores | AnswerPart]:
        """Yield what `GenerationService.generate` does, with the answers read; a sink takes parts as there.

        Raises:
            Fault: as it does.
        """
        readings: list[AnswerReader] = []

        def read(delta: AnswerDelta) -> AnswerPart:
            return AnswerPart(delta, self._released(readings[delta.index].push(delta.text)))

        deltas = None if sink is None else sink.mapped(read)
        with naming(self._chat.place):
            request, begin = await self._looked_up()
            with self._service.following_to_its_end(request):
                constraint = self._constraint(begin)
            request = replace(request, output=replace(request.output, constraint_by_ending=constraint))
            async with aclosing(self._service.generate(request, deltas)) as events:
                async for event in events:
                    match event:
                        case AnswerStarted():
                            opened = self._opened(event)
                            readings = [self._reading(opened) for _ in range(request.output.n)]
                            yield event
                        case PromptScores():
                            yield event
                        case AnswerDelta():
                            yield read(event)
                        case AnswerFinished():
                            yield AnswerPart(event, self._released(readings[event.index].finish()))

    async def prompt_tokens(self) -> int:
        """Return how many tokens the prompt has, also one that leaves no room for an answer.

        Raises:
            Fault: as `GenerationService.tokenize` does.
        """
        with naming(self._chat.place):
            request, _ = await self._looked_up()
            return len(await self._service.tokenize(request))

    async def _looked_up(self) -> tuple[Request, Callable[[], ConstraintAt] | None]:
        """Return the request as the model that answers it wants it, and what begins with its constraint."""
        served, defaults = await self._service.look_up(self.request)
        text = defaults.text or self._service.text
        self._dialect = dialect_of(text, defaults.template, self._service.parsers)
        begin = self._demanded(text)
        end = self._dialect.form.end if self._chat.one_call and not self._chat.forced else ""
        original, sampling = self.request, self.request.sampling
        messages: list[Message] = [turn for turn in original.prompt.content if isinstance(turn, Mapping)]
        if end:
            sampling = replace(sampling, stop=(*sampling.stop, end))
        special = self._dialect.tokens if self._tools else self._dialect.thinking_tokens
        request = replace(
            original,
            model=replace(original.model, served=served),
            prompt=replace(original.prompt, content=self._dialect.turns(messages)),
            sampling=sampling,
            output=replace(original.output, shown_special_tokens=special),
        )
        return request, begin

    def _demanded(self, text: Text) -> Callable[[], ConstraintAt] | None:
        """Return what begins with the constraint of the answers; None: there is none."""
        demand, several = Demand(self._dialect, text), not self._chat.one_call
        if self._chat.forced:
            tools = [_offered(tool) for tool in self._tools]
            grammar = demand.form(tools, several=several)
            if grammar is None:
                self._dialect = replace(self._dialect, tool=ToolParser.LLAMA3_JSON)  # which has no marks
            return lambda: partial(demand.calls, tools, grammar)
        strict = [tool.name for tool in self._tools if tool.strict]
        tools = [_offered(tool, free=not tool.strict) for tool in self._tools]
        constraint = self._chat.constraint
        if tools:
            if constraint is not None:
                return partial(demand.calls_or, constraint, tools, several)
            sampling = self.request.sampling
            restricted = sampling.allowed_token_ids is not None or sampling.bad_words
            return partial(demand.free, tools, strict) if strict or not restricted else None
        return None if constraint is None else lambda: partial(demand.behind_reasoning, constraint)

    def _constraint(self, begin: Callable[[], ConstraintAt] | None) -> ByEnding | None:
        """Return the constraint for each way in which a prompt can end."""
        if begin is None:
            return None
        constraint_at = begin()
        return ByEnding(tuple((end, constraint_at(end)) for end in (*self._dialect.endings, "")))

    def _opened(self, started: AnswerStarted) -> ThinkingMarks | None:
        """Return the reasoning that the answers continue with, if they do."""
        if not self._dialect.thinking:
            return None
        if self._chat.goes_on:
            return self._dialect.within(self._chat.turns[-1].content)
        return self._dialect.opened(started.text.end_of(started.prompt_token_ids))

    def _reading(self, opened: ThinkingMarks | None) -> AnswerReader:
        offered = {tool.name: tool.parameters or {} for tool in self._tools}
        return self._dialect.reading(AnswerCalls(offered, self._dialect.form.new_id), opened)

    def _released(self, pieces: Sequence[Piece]) -> list[Piece]:
        """Return the pieces that the client asks for."""
        return [piece for piece in pieces if self._wants(piece)]

    def _wants(self, piece: Piece) -> bool:
        if isinstance(piece, Thought):
            return self._chat.shows_thoughts
        if isinstance(piece, TextPiece):
            return not self._chat.forced  # only a call that was cut off before its name
        return not (self._chat.one_call and isinstance(piece, CallBegun | CallArguments) and piece.index)


def _offered(tool: ChatTool, *, free: bool = False) -> OfferedTool:
    """Return a tool as a grammar knows it; free: any arguments will do."""
    return OfferedTool(tool.name, ANY_ARGUMENTS if free else tool.parameters or ANY_ARGUMENTS)
