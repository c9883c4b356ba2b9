"""A chat as every door over HTTP has it: one request, and its answers read into pieces."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, replace

from inference_service.openai_api.chat_schema import ChatBody
from inference_service.openai_api.dialects.calls import Calls
from inference_service.openai_api.dialects.frame import Thinking
from inference_service.openai_api.dialects.table import dialect_of
from inference_service.openai_api.forced_call import ForcedCall
from inference_service.openai_api.mapping import callable_tools, chat_request, is_forced
from inference_service.openai_api.pieces import CallArguments, CallBegun, Piece, Reading, Thought
from inference_service.serving.request import Delta, Finished, PromptLogprobs, Request, Started
from inference_service.serving.service import GenerationService
from loramux_shared.faults import Fault


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
        self._offered = {tool.function.name: tool.function.parameters or {} for tool in callable_tools(body)}
        self._one_call = body.parallel_tool_calls is False and bool(self._offered)
        self._dialect = dialect_of("")
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
                        yield Told(event, self._told(readings[event.index].push(event.text)))
                    case Finished():
                        yield Told(event, self._told(readings[event.index].finish()))

    async def _looked_up(self) -> Request:
        """Return the request as the model that answers it wants it."""
        try:
            served = await self._service.naming.choose(self.request)
            defaults = await self._service.naming.defaults(served.model)
        except Fault:  # raised again where the request is followed
            return self.request
        template = defaults.template or (defaults.text or self._service.text).template
        parsers = self._service.parsers
        self._dialect = dialect_of(template.source if template else "", parsers.tool, parsers.reasoning)
        stops = self._one_call and not is_forced(self._body) and self._dialect.form.end
        return replace(
            self.request,
            served=served,
            shown_special_tokens=self._dialect.tokens,
            stop=(*self.request.stop, stops) if stops else self.request.stop,
        )

    def _opened(self, started: Started) -> Thinking | None:
        """Return the reasoning that the answers go on with, if they do."""
        if not self._dialect.thinking:
            return None
        if self._body.continue_final_message:
            return self._dialect.within(self._body.messages[-1].content or "")
        return self._dialect.opened(started.text.end_of(started.prompt_token_ids))

    def _reading(self, opened: Thinking | None) -> Reading:
        if is_forced(self._body):
            return ForcedCall()
        return self._dialect.reading(Calls(self._offered, short_ids=self._dialect.form.short_ids), opened)

    def _told(self, pieces: list[Piece]) -> list[Piece]:
        """Return the pieces that the client wants."""
        return [piece for piece in pieces if self._wants(piece)]

    def _wants(self, piece: Piece) -> bool:
        if isinstance(piece, Thought):
            return self._body.include_reasoning is not False
        return not (self._one_call and isinstance(piece, CallBegun | CallArguments) and piece.index)
