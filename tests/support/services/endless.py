"""A service with endless answers, and its APIs."""

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Self

from inference_service.api.http.server import HttpServer
from inference_service.api.http.wire import protocol
from inference_service.api.rpc.servicer import SERVICE_NAME, InferenceServicer
from inference_service.core.request import AnswerDelta, AnswerStarted, Event, Request
from inference_service.core.sequence import Token
from inference_service.text.text import Text
from loramux_shared.access.guard import NOBODY_GUARDS
from loramux_shared.rpc import calls
from loramux_shared.rpc.server import RpcServer
from tests.golden.openai.script import Case, Scripted
from tests.support.raw_http import RawClient
from tests.support.tokens import VOCAB, write_tokenizer
from tests.support.waiting import until

MODEL = "tiny"
BOUND = 8
"""Connections of each API."""
PIECE = 8000
"""Characters."""
HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"


class Endless(Scripted):
    """Repeats a piece until a cancellation; the prompt ``WAIT`` is answered by one piece and silence."""

    def __init__(self, folder: Path) -> None:
        write_tokenizer(folder)
        super().__init__(Case("chat", {}, []), Text.load(folder, VOCAB))
        self.open = 0
        self.pieces = 0
        """Number of pieces taken from all answers."""

    async def generate(self, request: Request, _sink: object = None) -> AsyncGenerator[Event]:
        self.open += 1
        try:
            yield AnswerStarted(request.id, self.local.catalog.get(request.model.name), 7, 2, self.text)
            while True:
                yield AnswerDelta("x" * PIECE, (Token(5),), 0)
                self.pieces += 1
                await (asyncio.Event().wait() if request.prompt.content == "WAIT" else asyncio.sleep(0))
        finally:
            self.open -= 1

    async def until(self, count: int) -> None:
        await until(lambda: self.open == count, f"{count} answers to be held", lambda: self.open)


def apis_of(
    service: Endless, guard=NOBODY_GUARDS, http=protocol.USUAL, rpc=calls.USUAL, bound: int | None = None
):
    """Return both APIs on free ports."""
    services = {SERVICE_NAME: InferenceServicer(service).register}
    return (
        HttpServer("127.0.0.1:0", service, guard, patience=http, max_connections=bound),
        RpcServer("127.0.0.1:0", services, guard, patience=rpc, max_connections=bound),
    )


class EndlessApis:
    """An endless service, and both of its APIs, with few connections each."""

    def __init__(self, folder: Path, guard=NOBODY_GUARDS, http=protocol.USUAL, rpc=calls.USUAL) -> None:
        self.service = Endless(folder)
        self.http, self.rpc = apis_of(self.service, guard, http, rpc, BOUND)

    async def __aenter__(self) -> Self:
        await self.http.start()
        await self.rpc.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close both servers, and check that no answer is left open."""
        await asyncio.gather(self.http.drain(0), self.rpc.drain(0))
        assert self.service.open == 0

    async def raw(self, data: bytes = b"") -> RawClient:
        """Connect to the HTTP API, and send something."""
        client = await RawClient.open(self.http.address)
        await client.send(data)
        return client

    async def seen(self) -> None:
        """Return when the HTTP API has read everything that clients of this process sent it before."""
        client = await self.raw(HEALTH)
        await client.answer()
        client.close()
