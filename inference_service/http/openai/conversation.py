"""A chat as every door over HTTP has it: one request, and its answers read into pieces."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

from inference_service.chat.demands import Demand
from inference_service.chat.dialect import Dialect, dialect_of
from inference_service.chat.formats.frame import Thinking
from inference_service.chat.formats.lark import Asked
from inference_service.chat.pieces import CallArguments, CallBegun, Calls, Piece, Reading, Said, Thought
from inference_service.core.constraint import Constraint
from inference_service.http.openai.chat_schema import ChatBody, NamedTool, Tool
from inference_service.http.openai.mapping import callable_tools, chat_request, demanded_tools, is_forced
from inference_service.serving.request import Delta, Finished, Message, PromptLogprobs, Request, Started
from inference_service.serving.service import GenerationService
from inference_service.text.text import Text
from loramux_shared.parsers import ReasoningParser, ToolParser

UNKNOWN: Final = Dialect(ToolParser.AUTO, ReasoningParser.AUTO)
ANY_ARGUMENTS: Final[Mapping[str, Any]] = {"type": "object"}


@dataclass(frozen=True)
class Told:
    """More of an answer, or its end, and what that says."""

    event: Delta | Finished
    pieces: list[Piece]


class Conversation:
    """One request and its n answers."""

    def __init__(self, service: GenerationService, body: ChatBody, headers: Mapping[str, str]) -> None:
        """Make a request of a body.

        Raises:
            RequestInvalid: fields contradict each other, or a header is wrong.
        """
        self._service = service
        self._body = body
        self._forced = is_forced(body)
        self._tools = demanded_tools(body) if self._forced else callable_tools(body)
        self._one_call = bool(self._tools) and (
            body.parallel_tool_calls is False or isinstance(body.tool_choice, NamedTool)
        )
        self._dialect = UNKNOWN
        """Of the model that answers, once that is known."""
        self.request = chat_request(body, headers)

    async def events(self) -> AsyncGenerator[Started | PromptLogprobs | Told]:
        """Yield what `GenerationService.generate` does, with the answers read.

        Raises:
            Fault: as it does.
        """
        readings: list[Reading] = []
        request = await self._looked_up()
        async with aclosing(self._service.generate(request)) as events:
            async for event in events:
                match event:
                    case Started():
                        opened = self._opened(event)
                        readings = [self._reading(opened) for _ in range(request.n)]
                        yield event
                    case PromptLogprobs():
                        yield event
                    case Delta():
                        yield Told(event, self._wanted(readings[event.index].push(event.text)))
                    case Finished():
                        yield Told(event, self._wanted(readings[event.index].finish()))

    async def prompt_tokens(self) -> int:
        """Return how many tokens the prompt has, also one that leaves no room for an answer.

        Raises:
            Fault: as `GenerationService.tokenize` does.
        """
        return len(await self._service.tokenize(await self._looked_up()))

    async def _looked_up(self) -> Request:
        """Return the request as the model that answers it wants it."""
        served, defaults = await self._service.look_up(self.request)
        text = defaults.text or self._service.text
        self._dialect = dialect_of(text, defaults.template, self._service.parsers)
        constraint_for = self._constraint_for(text)
        end = self._dialect.form.end if self._one_call and not self._forced else ""
        messages: list[Message] = [turn for turn in self.request.prompt if isinstance(turn, Mapping)]
        return replace(
            self.request,
            served=served,
            prompt=self._dialect.turns(messages),
            constraint_for=constraint_for,
            shown_special_tokens=self._dialect.tokens if self._tools else self._dialect.thinking_tokens,
            stop=(*self.request.stop, end) if end else self.request.stop,
        )

    def _constraint_for(self, text: Text) -> Callable[[str], Constraint | None] | None:
        """Return what makes the constraint of the answers once the prompt is known; None: there is none."""
        demand = Demand(self._dialect, text)
        if self._forced:
            tools = [_asked(tool) for tool in self._tools]
            grammar = demand.form(tools, several=not self._one_call)
            if grammar is None:
                self._dialect = replace(self._dialect, tool=ToolParser.LLAMA3_JSON)  # which has no marks
            return partial(demand.calls, tools, grammar)
        strict = [tool.function.name for tool in self._tools if tool.function.strict]
        tools = [_asked(tool, free=not tool.function.strict) for tool in self._tools]
        wanted = self.request.constraint
        if tools:
            if wanted is not None:
                return partial(demand.calls_or, wanted, tools, not self._one_call)
            restricted = self.request.allowed_token_ids is not None or self._body.bad_words
            return partial(demand.free, tools, strict) if strict or not restricted else None
        return None if wanted is None else partial(demand.behind_reasoning, wanted)

    def _opened(self, started: Started) -> Thinking | None:
        """Return the reasoning that the answers go on with, if they do."""
        if not self._dialect.thinking:
            return None
        if self._body.continue_final_message:
            return self._dialect.within(self._body.messages[-1].content or "")
        return self._dialect.opened(started.text.end_of(started.prompt_token_ids))

    def _reading(self, opened: Thinking | None) -> Reading:
        offered = {tool.function.name: tool.function.parameters or {} for tool in self._tools}
        return self._dialect.reading(Calls(offered, self._dialect.form.new_id), opened)

    def _wanted(self, pieces: Sequence[Piece]) -> list[Piece]:
        """Return the pieces that the client asks for."""
        return [piece for piece in pieces if self._wants(piece)]

    def _wants(self, piece: Piece) -> bool:
        if isinstance(piece, Thought):
            return self._body.include_reasoning is not False
        if isinstance(piece, Said):
            return not self._forced  # it can only be a call that was cut off before its name
        return not (self._one_call and isinstance(piece, CallBegun | CallArguments) and piece.index)


def _asked(tool: Tool, *, free: bool = False) -> Asked:
    """Return a tool as a grammar knows it; free: any arguments will do."""
    return Asked(tool.function.name, ANY_ARGUMENTS if free else tool.function.parameters or ANY_ARGUMENTS)
