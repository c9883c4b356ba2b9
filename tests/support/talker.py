"""A door in front of a service that says what a test gave it, request by request."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
from openai import AsyncOpenAI

from inference_service.core.sequence import FinishReason
from inference_service.openai_api.server import HttpServer
from inference_service.serving.request import Event, Request
from inference_service.serving.text import Text
from tests.golden.openai.script import Case, Scripted
from tests.support.tokens import VOCAB, write_tokenizer


class Talker(Scripted):
    """Answers requests as it is told, in their order, and keeps them."""

    def __init__(self, text: Text) -> None:
        super().__init__(Case("chat", {}, []), text)
        self.asked: list[Request] = []
        self._cases: list[Case] = []

    def say(
        self, answer: str, reason: FinishReason = FinishReason.STOP, failure: Exception | None = None
    ) -> None:
        """Answer one more request, in steps that are separated by ``|``."""
        self._cases.append(Case("chat", {}, [answer], reason, failure))

    def say_nothing(self, failure: Exception) -> None:
        """Fail one more request before its first token."""
        self._cases.append(Case("chat", {}, [], failure=failure))

    async def generate(self, request: Request) -> AsyncGenerator[Event]:
        """Say what comes next."""
        self.asked.append(request)
        self._case = self._cases.pop(0)
        async for event in super().generate(request):
            yield event

    @property
    def last(self) -> Sequence[Any]:
        """The messages of the last request."""
        [*_, request] = self.asked
        return request.prompt


class TalkerDoor:
    """A server and clients of it."""

    def __init__(self, talker: Talker, server: HttpServer) -> None:
        self.talker = talker
        self.url = f"http://{server.address}"
        self.http = httpx.AsyncClient(base_url=self.url, timeout=30)
        self.openai = AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=30)

    async def post(self, path: str, **body: Any) -> httpx.Response:
        """Send a body."""
        return await self.http.post(path, json=body)


@asynccontextmanager
async def open_talker(folder: Path) -> AsyncIterator[TalkerDoor]:
    """Listen on a free port; a tokenizer lies in a folder."""
    write_tokenizer(folder)
    talker = Talker(Text.load(folder, VOCAB))
    server = HttpServer("127.0.0.1:0", talker)
    await server.start()
    door = TalkerDoor(talker, server)
    try:
        yield door
    finally:
        await door.http.aclose()
        await door.openai.close()
        await server.drain(5)
