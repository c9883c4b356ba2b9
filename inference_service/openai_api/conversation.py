"""A chat as every door over HTTP has it: one request, and its answers read into pieces."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass

from inference_service.openai_api.chat_schema import ChatBody
from inference_service.openai_api.forced_call import ForcedCall
from inference_service.openai_api.mapping import chat_request, is_forced, offered_tools
from inference_service.openai_api.pieces import Piece, Plain, Reading, Thought
from inference_service.openai_api.tagged_calls import TaggedCalls
from inference_service.serving.request import Delta, Finished, PromptLogprobs, Started
from inference_service.serving.service import GenerationService


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
        self.request = chat_request(body, headers)

    async def events(self) -> AsyncGenerator[Started | PromptLogprobs | Told]:
        """Yield what `GenerationService.generate` does, with the answers read.

        Raises:
            Fault: as it does.
        """
        readings: list[Reading] = []
        async with aclosing(self._service.generate(self.request)) as events:
            async for event in events:
                match event:
                    case Started():
                        readings = [self._reading() for _ in range(self.request.n)]
                        yield event
                    case PromptLogprobs():
                        yield event
                    case Delta():
                        yield Told(event, self._told(readings[event.index].push(event.text)))
                    case Finished():
                        yield Told(event, self._told(readings[event.index].finish()))

    def _told(self, pieces: list[Piece]) -> list[Piece]:
        if self._body.include_reasoning is not False:
            return pieces
        return [piece for piece in pieces if not isinstance(piece, Thought)]

    def _reading(self) -> Reading:
        if is_forced(self._body):
            return ForcedCall()
        names = {tool.function.name for tool in offered_tools(self._body)}
        return TaggedCalls(names) if names else Plain()
