"""An API in front of a service with scripted answers, request by request."""

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from inference_service.api.http.server import HttpServer
from inference_service.core.request import Event, Request
from inference_service.core.sequence import EndReason
from inference_service.text.text import Text
from loramux_shared.access.guard import NOBODY_GUARDS, Guard
from tests.golden.openai.script import Case, Scripted
from tests.support.openai_api import ServedApi
from tests.support.servers import ANY_PORT, serve
from tests.support.tokens import VOCAB, write_tokenizer


class ScriptedService(Scripted):
    """Answers requests as scripted, in their order, and keeps them."""

    def __init__(self, text: Text) -> None:
        super().__init__(Case("chat", {}, []), text)
        self.asked: list[Request] = []
        self._cases: list[Case] = []

    def say(self, *answers: str, reason: EndReason = EndReason.STOP, failure: Exception | None = None) -> None:
        """Answer one more request with each, in steps that are separated by ``|``."""
        self._cases += (Case("chat", {}, [answer], reason, failure) for answer in answers)

    async def generate(self, request: Request, _sink: object = None) -> AsyncGenerator[Event]:
        self.asked.append(request)
        self._case = self._cases.pop(0)
        async for event in super().generate(request):
            yield event

    @property
    def last(self) -> Sequence[Any]:
        [*_, request] = self.asked
        return request.prompt.content


class ScriptedApi(ServedApi):
    """A served API with a scripted service."""

    def __init__(self, service: ScriptedService, server: HttpServer) -> None:
        super().__init__(server)
        self.service = service


@asynccontextmanager
async def open_scripted(folder: Path, guard: Guard = NOBODY_GUARDS) -> AsyncIterator[ScriptedApi]:
    """Listen on a free port; a tokenizer lies in a folder."""
    write_tokenizer(folder)
    (folder / "chat_template.jinja").write_text("??")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens(["\n"])
    tokenizer.save(str(folder / "tokenizer.json"))
    service = ScriptedService(Text.load(folder, VOCAB + 1))
    async with serve(HttpServer(ANY_PORT, service, guard)) as server:
        api = ScriptedApi(service, server)
        yield api
        await api.close()
