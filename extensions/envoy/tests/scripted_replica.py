"""Replicas in this process that compute nothing, report a name, and can be held before a first token."""

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path

from inference_service.adapters.catalog import Catalog
from inference_service.api.http.server import HttpServer
from inference_service.api.rpc.servicer import SERVICE_NAME, InferenceServicer
from inference_service.core.request import (
    AnswerDelta,
    AnswerFinished,
    AnswerStarted,
    Event,
    Request,
    TokenUsage,
)
from inference_service.core.sequence import EndReason, Token
from inference_service.core.served_model import ServedModel
from inference_service.text.text import Text
from loramux_shared.access.guard import NOBODY_GUARDS, Guard
from loramux_shared.faults import Fault
from loramux_shared.rpc.server import RpcServer
from tests.golden.openai.script import Case, Scripted
from tests.support.tokens import VOCAB, write_tokenizer

MODELS = ("base", *(f"lora{number}" for number in range(47)))


class Named(Scripted):
    """Says its name, and the prompt ``WAIT`` keeps it from saying more."""

    def __init__(self, folder: Path, name: str) -> None:
        write_tokenizer(folder)
        catalog = Catalog(1, MODELS[0], map(ServedModel, MODELS))
        super().__init__(Case("chat", {}, []), Text.load(folder, VOCAB), catalog)
        self.name = name
        self.asked = self.open = 0
        self.refuses: Fault | None = None
        """Fault with which every request ends."""
        self.tokens = asyncio.Event()
        """Not set: requests are taken, and have no text."""
        self.tokens.set()
        self.ends = asyncio.Event()
        """For those that wait."""

    async def generate(self, request: Request, _sink: object = None) -> AsyncGenerator[Event]:
        """Answer once the gate of tokens is open."""
        model = self.local.catalog.get(request.model.name)
        if self.refuses is not None:
            raise self.refuses
        self.asked += 1
        self.open += 1
        try:
            yield AnswerStarted(request.id, model, 1, 2, self.text)
            if not self.tokens.is_set():
                yield AnswerDelta("", (Token(5),), 0)  # part of a character
            await self.tokens.wait()
            yield AnswerDelta(self.name, (Token(5),), 0)
            if request.prompt.content == "WAIT":
                await self.ends.wait()
            yield AnswerFinished(EndReason.STOP, "", TokenUsage(2, 0, 1))
        finally:
            self.open -= 1


class ScriptedReplica:
    """A scripted replica, and both of its APIs."""

    def __init__(self, folder: Path, name: str, guard: Guard = NOBODY_GUARDS) -> None:
        self.service = Named(folder, name)
        services = {SERVICE_NAME: InferenceServicer(self.service).register}
        self.http = HttpServer("127.0.0.1:0", self.service, guard)
        self.grpc = RpcServer("127.0.0.1:0", services, guard)

    @property
    def apis(self) -> tuple[str, str]:
        return self.grpc.address, self.http.address

    async def start(self) -> None:
        await self.http.start()
        await self.grpc.start()
        await self.grpc.set_serving(True)

    async def leave(self) -> None:
        """Have no health any more, and continue."""
        await asyncio.gather(self.http.leave(), self.grpc.leave())

    async def drain(self, timeout_s: float = 0.0) -> None:
        await asyncio.gather(self.http.drain(timeout_s), self.grpc.drain(timeout_s))
