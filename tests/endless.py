"""A service whose answers never end, and who holds one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path

from inference_service.core.sequence import Token
from inference_service.serving.request import Delta, Event, Request, Started
from inference_service.serving.text import Text
from tests.golden.openai.script import Case, Scripted
from tests.tiny import VOCAB, write_tokenizer

MODEL = "tiny"


class Endless(Scripted):
    """Says the same piece until somebody stops it; the prompt ``WAIT`` is answered by one piece and silence."""

    def __init__(self, folder: Path) -> None:
        write_tokenizer(folder)
        super().__init__(Case("chat", {}, []), Text.load(folder, VOCAB))
        self.open = 0

    async def generate(self, request: Request) -> AsyncGenerator[Event]:
        """Go on and on."""
        self.open += 1
        try:
            yield Started(request.id, self.catalog.get(request.model), 7, 2)
            while True:
                yield Delta("x" * 1000, (Token(5),), 0)
                await asyncio.sleep(3600 if request.prompt == "WAIT" else 0)
        finally:
            self.open -= 1

    async def until(self, count: int, within_s: float = 5.0) -> None:
        """Wait until so many answers are held."""
        async with asyncio.timeout(within_s):
            while self.open != count:
                await asyncio.sleep(0.01)
