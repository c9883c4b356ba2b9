"""A service with scripted answers, so that a transcript depends on nothing but the API."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from tokenizers import Tokenizer

from inference_service.adapters.catalog import Catalog
from inference_service.api.http.app import create_app
from inference_service.api.http.wire.reply import CONNECTION
from inference_service.api.requests.service import GenerationService
from inference_service.api.requests.terms import ServingLimits
from inference_service.core.sequence import EndReason, Token
from inference_service.core.served_model import ServedModel
from inference_service.driver.engine_driver import EngineDriver
from inference_service.driver.engine_thread import EngineThread
from inference_service.driver.fake_driver import FakeDriver, Script
from inference_service.engine.engine import SequenceCounts
from inference_service.text.chat_template import ChatTemplate
from inference_service.text.text import Text
from loramux_shared.faults import InternalFault, ReplicaFailed
from tests.golden.metrics.script import replica
from tests.support.tokens import VOCAB, write_tokenizer

FOLDER = Path(__file__).parent
PATHS = {
    "chat": "/v1/chat/completions",
    "completion": "/v1/completions",
    "message": "/v1/messages",
    "responses": "/v1/responses",
}


@dataclass(frozen=True)
class Case:
    """A request, and what the engine is to say to it."""

    endpoint: str
    body: dict[str, Any]
    answers: Sequence[str]
    """Answers in steps that are separated by ``|``; the answers take turns."""
    reason: EndReason = EndReason.STOP
    failure: Exception | None = None
    """Comes in place of the end."""


CHAT_BODY = {"model": "pirate", "messages": [{"role": "user", "content": "Hi"}]}
FAULTS = {kind.__name__: kind("the engine failed.") for kind in (InternalFault, ReplicaFailed)}
CASES = {
    name: Case(
        reason=EndReason(case.pop("reason", "stop")), failure=FAULTS.get(case.pop("failure", "")), **case
    )
    for name, case in json.loads((FOLDER / "requests.json").read_text()).items()
}


class Scripted(GenerationService):
    """Answers every request as a case says."""

    def __init__(self, case: Case, text: Text, catalog: Catalog | None = None) -> None:
        models = [
            ServedModel("tiny", source="org/tiny@main"),
            ServedModel("pirate", digest="0123456789abcdef" * 4),
        ]
        catalog, limits = catalog or Catalog(7, "tiny", models), ServingLimits(256, frozenset({2}))
        driver = FakeDriver(catalog, text, lambda _: self._script())
        super().__init__(driver, text, limits, replica(SequenceCounts({}, {})))
        self._local = EngineDriver(catalog, cast(EngineThread, SimpleNamespace()), text, limits.eos_token_ids)
        self._case = case

    @property
    def local(self) -> EngineDriver:
        return self._local

    def _script(self) -> Script:
        answers = [answer.split("|") for answer in self._case.answers]
        prompt = Token(36), Token(37, -1.5, ((38, -0.25),))
        return Script(answers, self._case.reason, self._case.failure, prompt=prompt)


class Direct:
    """An application whose streams can be written to past `send`, as a connection's can."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._body = bytearray()
        self.write_part = self._body.extend

    def has_room(self) -> bool:
        """Take everything behind the first event."""
        return bool(self._body)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request with the parts of both ways in one."""

        async def collect(message: Message) -> None:
            self._body += message.get("body", b"")
            if message["type"] == "http.response.start":
                await send(message)
            elif not message.get("more_body"):
                await send(message | {"body": bytes(self._body)})

        await self._app(scope | {"state": {CONNECTION: self}}, receive, collect)


async def transcript(case: Case, folder: Path, *, direct: bool = False) -> bytes:
    """Return the body of the answer, with a fixed time and fixed ids."""
    write_tokenizer(folder)
    text = Text(Tokenizer.from_file(str(folder / "tokenizer.json")), ChatTemplate("??", {}), VOCAB)
    app = create_app(Scripted(case, text))
    transport = httpx.ASGITransport(Direct(app) if direct else app)
    async with httpx.AsyncClient(transport=transport, base_url="http://api") as client:
        answer = await client.post(PATHS[case.endpoint], json=case.body)
    fixed = re.sub(rb'"(created|created_at|completed_at)":\d+', rb'"\1":0', answer.content)
    fixed = re.sub(rb'"((?:chat)?cmpl-|call_|resp_|msg_|fc_|rs_)[0-9a-f]+"', rb'"\1ID"', fixed)
    fixed = re.sub(rb'"request_id":"[0-9a-f]+"', b'"request_id":"ID"', fixed)
    return fixed if answer.content.endswith(b"\n\n") else pretty(fixed)


def pretty(body: bytes) -> bytes:
    """Return JSON with a line for every value, so that a diff can be read."""
    return (json.dumps(json.loads(body), indent=1, ensure_ascii=False) + "\n").encode()


def of_api(endpoint: str) -> dict[str, Case]:
    """Return the cases of one API, by their names."""
    return {name: case for name, case in CASES.items() if case.endpoint == endpoint}


def path_of(endpoint: str) -> Path:
    """Return the file with the transcript of one API."""
    return FOLDER / f"{endpoint}.txt"


def joined(answers: Mapping[str, bytes]) -> bytes:
    """Return the transcript of one API: each answer behind the name of its case."""
    return b"\n".join(f"=== {name}\n".encode() + answer for name, answer in answers.items())


def answer_of(name: str) -> bytes:
    """Return the recorded answer of a case."""
    recorded = b"\n" + path_of(CASES[name].endpoint).read_bytes()
    _, _, behind = recorded.partition(f"\n=== {name}\n".encode())
    return behind.partition(b"\n=== ")[0]
