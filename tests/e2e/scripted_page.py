"""An API for tests of the page, whose models have scripted answers."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from inference_service.adapters.catalog import Catalog
from inference_service.adapters.manager import AdapterManager
from inference_service.api.http import server as api
from inference_service.api.http.server import HttpServer
from inference_service.api.requests.service import GenerationService
from inference_service.api.requests.terms import ServingLimits
from inference_service.core.adapter import Adapter
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
from inference_service.driver.engine_driver import EngineDriver
from inference_service.driver.engine_thread import EngineThread
from inference_service.engine.engine import SequenceCounts
from inference_service.text.text import Text
from loramux_shared.access.guard import Guard
from loramux_shared.access.keyring import Keyring
from tests.support.services.silent import IDLE
from tests.support.tokens import VOCAB, write_tokenizer

STATS = replace(
    IDLE,
    waiting=2,
    running=3,
    blocks_free=6,
    prefix_tokens_queried=40,
    prefix_tokens_hit=10,
    tokens_generated=7,
)


def models(adapters: Sequence[str]) -> list[ServedModel]:
    made = [ServedModel("base")]
    for nth, name in enumerate(adapters, start=1):
        made.append(ServedModel(name, Adapter(f"{nth:064x}", 0), digest=f"{nth:064x}", ranks=(4, 5 + nth % 3)))
    return made


class ScriptedPage(GenerationService):
    """Says for each model its pieces, the end of them being an answer's, a failure, or nothing at all."""

    def __init__(
        self, folder: Path, adapters: Sequence[str], says: Mapping[str, Sequence[str | Exception | None]]
    ) -> None:
        """Serve adapters; where says has a None, the answer waits for ever."""
        write_tokenizer(folder)
        sequences = SequenceCounts({"base": 1, adapters[0]: 2}, {adapters[-1]: 2})
        engine = cast(EngineThread, SimpleNamespace(max_queue=8, stats=STATS, sequence_counts=sequences))
        catalog = Catalog(7, "base", models(adapters))
        text, limits = Text.load(folder, VOCAB), ServingLimits(256, frozenset({2}))
        driver = EngineDriver(catalog, engine, text, limits.eos_token_ids)
        super().__init__(driver, text, limits, driver.metrics)
        self._says = says
        self.asked: list[str] = []
        """The models of requests, as they came."""
        self.let_go = 0
        """Requests that ended before their answer."""

    async def generate(self, request: Request, _sink: object = None) -> AsyncGenerator[Event]:
        """Answer with the model's script."""
        self.asked.append(request.model.name)
        model = self.local.catalog.get(request.model.name)
        yield AnswerStarted(request.id, model, self.local.catalog.generation, 2, self.text)
        pieces = self._says.get(request.model.name, ("Ahoy", "!"))
        for piece in pieces:
            if isinstance(piece, Exception):
                raise piece
            if piece is None:
                try:
                    await asyncio.Event().wait()
                finally:
                    self.let_go += 1
            else:
                yield AnswerDelta(piece, (Token(3),))
                await asyncio.sleep(0.01)  # the browser sees the pieces one by one
        yield AnswerFinished(EndReason.STOP, "", TokenUsage(2, 1, len(pieces)))


@asynccontextmanager
async def scripted_api(
    service: ScriptedPage, keyring: Keyring | None = None, adapters: AdapterManager | None = None
) -> AsyncIterator[str]:
    """Serve the page's API on a free port; yields its URL."""
    server = HttpServer("127.0.0.1:0", service, Guard(keyring), adapters=adapters)
    try:
        yield f"http://{await server.start()}"
    finally:
        await _close(server)


async def _close(server: HttpServer) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(api, "CUT_S", 0.05)  # a browser keeps its connections as long as it may
        await server.drain(0.1)
