"""A service with scripted answers, so that a transcript depends on nothing but the API."""

import json
import re
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from tokenizers import Tokenizer

from inference_service.adapters.catalog import Catalog
from inference_service.adapters.served_model import ServedModel
from inference_service.core.sequence import EndReason, Token
from inference_service.engine.engine import SequenceCounts
from inference_service.http.app import create_app
from inference_service.http.wire.reply import CONNECTION
from inference_service.serving.bounds import check
from inference_service.serving.delivery import Sink
from inference_service.serving.engine_driver import EngineDriver
from inference_service.serving.engine_thread import EngineThread
from inference_service.serving.request import (
    AnswerDelta,
    AnswerFinished,
    AnswerStarted,
    Event,
    PromptScores,
    Request,
)
from inference_service.serving.service import GenerationService
from inference_service.serving.terms import ServingLimits
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

    def __init__(self, case: Case, text: Text) -> None:
        models = [
            ServedModel("tiny", source="org/tiny@main"),
            ServedModel("pirate", digest="0123456789abcdef" * 4),
        ]
        engine = cast(EngineThread, SimpleNamespace())
        limits = ServingLimits(256, frozenset({2}))
        driver = EngineDriver(Catalog(7, "tiny", models), engine, text, limits.eos_token_ids)
        super().__init__(driver, text, limits, replica(SequenceCounts({}, {})))
        self._case = case

    async def generate(self, request: Request, sink: Sink[AnswerDelta] | None = None) -> AsyncGenerator[Event]:
        check(request, self.text.vocab, max_queue=16, max_seq_len=self.limits.max_seq_len)
        prompt = request.prompt.content if isinstance(request.prompt.content, str) else "??"
        yield AnswerStarted(request.id, self.local.catalog.get(request.model.name), 7, len(prompt), self.text)
        if request.sampling.prompt_logprobs is not None:
            yield PromptScores((Token(36), Token(37, -1.5, ((38, -0.25),))))
        steps = [answer.split("|") for answer in self._case.answers]
        for nth in range(max(map(len, steps), default=0)):
            for index, answer in enumerate(steps):
                delta = AnswerDelta(answer[nth], self._tokens(answer[nth], request.sampling.logprobs), index)
                if sink is not None and nth and sink.has_room():
                    sink.take(delta)
                else:
                    yield delta
        if self._case.failure:
            raise self._case.failure
        for index, answer in enumerate(steps):
            yield AnswerFinished(self._case.reason, "", len(prompt), 1, len("".join(answer)), index)

    def _tokens(self, text: str, logprobs: int | None) -> tuple[Token, ...]:
        ids = self.text.encode(text)
        if logprobs is None:
            return tuple(map(Token, ids))
        return tuple(Token(number, -0.5, ((number, -0.5),)[:logprobs]) for number in ids)


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
    text = Text(Tokenizer.from_file(str(folder / "tokenizer.json")), None, VOCAB)
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
