"""A service with scripted answers, so that a transcript depends on nothing but the API."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx
from tokenizers import Tokenizer

from inference_service.adapters.catalog import Catalog
from inference_service.adapters.served_model import ServedModel
from inference_service.core.sequence import EndReason, Token
from inference_service.engine.engine import SequenceCounts
from inference_service.http.app import create_app
from inference_service.serving.bounds import check
from inference_service.serving.engine_thread import EngineThread
from inference_service.serving.request import (
    AnswerDelta,
    AnswerFinished,
    AnswerStarted,
    Event,
    PromptScores,
    Request,
)
from inference_service.serving.service import GenerationService, ServingLimits
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
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
WEATHER_HERE = {"type": "function", "name": "weather", "parameters": {"type": "object"}}
NAMESPACE = {
    "type": "namespace",
    "name": "sky",
    "description": "The sky.",
    "tools": [WEATHER_HERE, WEATHER_HERE | {"name": "no name"}],
}
CHAT_BODY = {"model": "pirate", "messages": [{"role": "user", "content": "Hi"}]}


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


LONG_CHAT = CHAT_BODY | {"max_tokens": 50}
LOOK = {"name": "look", "input_schema": {"type": "object"}}
CASES = {
    "chat": Case("chat", CHAT_BODY, ["Ahoy!"]),
    "chat_stream": Case("chat", CHAT_BODY | {"stream": True}, ["A|hoy|!"]),
    "chat_stream_usage": Case(
        "chat",
        CHAT_BODY | {"stream": True, "stream_options": {"include_usage": True}},
        ["A|hoy"],
        EndReason.LENGTH,
    ),
    "chat_stream_two_logprobs": Case(
        "chat", CHAT_BODY | {"stream": True, "n": 2, "logprobs": True, "top_logprobs": 1}, ["A|h", "B|o"]
    ),
    "chat_stream_tool_auto": Case(
        "chat",
        CHAT_BODY | {"stream": True, "tools": [WEATHER]},
        ['Let me see.<tool|_call>{"name": "weather", "argu|ments": {"city": "Oslo"}}</tool_call>'],
    ),
    "chat_stream_tool_required": Case(
        "chat",
        CHAT_BODY | {"stream": True, "tools": [WEATHER], "tool_choice": "required"},
        ['{"name": "weat|her", "arguments": {"ci|ty": "Oslo"}}'],
    ),
    "chat_stream_failure": Case(
        "chat", CHAT_BODY | {"stream": True}, ["A|h"], failure=InternalFault("the engine failed.")
    ),
    "chat_tool": Case(
        "chat",
        CHAT_BODY | {"tools": [WEATHER]},
        ['<tool_call>{"name": "weather", "arguments": {}}</tool_call>'],
    ),
    "chat_unknown_parameter": Case("chat", CHAT_BODY | {"temprature": 1}, []),
    "completion_echo_logprobs": Case(
        "completion",
        {"model": "tiny", "prompt": ["AB", [36, 37]], "echo": True, "logprobs": 1, "max_tokens": 1},
        ["C"],
        EndReason.LENGTH,
    ),
    "message": Case("message", LONG_CHAT | {"stop_sequences": ["x"]}, ["Ahoy!"]),
    "message_stream": Case("message", LONG_CHAT | {"stream": True}, ["A|hoy"], EndReason.LENGTH),
    "message_stream_failure": Case(
        "message", LONG_CHAT | {"stream": True}, ["A|h"], failure=InternalFault("the engine failed.")
    ),
    "message_stream_tool": Case(
        "message",
        LONG_CHAT | {"stream": True, "tools": [LOOK], "tool_choice": {"type": "any"}},
        ['{"name": "lo|ok", "arguments": {"ci|ty": "Oslo"}}'],
    ),
    "message_stream_tool_results": Case(
        "message",
        LONG_CHAT
        | {
            "stream": True,
            "system": "Be brief.",
            "tools": [LOOK],
            "messages": [
                *CHAT_BODY["messages"],
                {
                    "role": "assistant",
                    "content": [{"type": "tool_use", "id": "c1", "name": "look", "input": {}}],
                },
                {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c1", "content": "Blue."}]},
            ],
        },
        ["It is |blue."],
    ),
    "message_refused": Case(
        "message", LONG_CHAT | {"stop_sequences": [""], "tools": [LOOK | {"name": "no name"}], "top_p": 2}, []
    ),
    "message_unknown_parameter": Case("message", LONG_CHAT | {"temprature": 1}, []),
    "responses": Case(
        "responses",
        {"model": "pirate", "instructions": "Be brief.", "input": "Hi", "metadata": {"a": "b"}},
        ["Ahoy!"],
    ),
    "responses_stream_incomplete": Case(
        "responses",
        {"model": "pirate", "input": "Hi", "stream": True, "include": ["message.output_text.logprobs"]},
        ["A|hoy"],
        EndReason.LENGTH,
    ),
    "responses_stream_tool": Case(
        "responses",
        {"model": "pirate", "input": "Hi", "stream": True, "tools": [WEATHER_HERE]},
        ['Let me see.<tool|_call>{"name": "weather", "argu|ments": {"city": "Oslo"}}</tool_call>'],
    ),
    "responses_stream_failure": Case(
        "responses",
        {"model": "pirate", "input": "Hi", "stream": True},
        ["A|h"],
        failure=ReplicaFailed("the engine failed."),
    ),
    "responses_stream": Case(
        "responses",
        {"model": "pirate", "input": "Hi", "stream": True, "instructions": "Be brief."},
        ["A|hoy|!"],
    ),
    "responses_refused_fields": Case(
        "responses",
        {
            "model": "pirate",
            "input": [{"role": "user", "content": "Hi"}],
            "tools": [WEATHER_HERE, NAMESPACE],
            "max_output_tokens": -1,
            "top_p": 2,
        },
        [],
    ),
    "responses_refused": Case(
        "responses",
        {"model": "pirate", "input": [{"type": "item_reference", "id": "msg_1"}], "previous_response_id": "r"},
        [],
    ),
    "chat_refused": Case(
        "chat",
        CHAT_BODY
        | {
            "max_completion_tokens": -1,
            "top_p": 2,
            "tools": [WEATHER | {"function": {"name": "no name"}}],
            "messages": [{"role": "tool", "content": "4"}],
        },
        [],
    ),
    "completion_refused": Case("completion", {"model": "tiny", "prompt": "AB", "min_p": 2, "stop": [""]}, []),
    "completion_stream": Case("completion", {"model": "tiny", "prompt": "AB", "stream": True}, ["C|D"]),
}


class Scripted(GenerationService):
    """Answers every request as a case says."""

    def __init__(self, case: Case, text: Text) -> None:
        models = [
            ServedModel("tiny", source="org/tiny@main"),
            ServedModel("pirate", digest="0123456789abcdef" * 4),
        ]
        engine = cast(EngineThread, SimpleNamespace())
        super().__init__(Catalog(7, "tiny", models), text, engine, ServingLimits(256, frozenset({2})))
        self.metrics = replica(SequenceCounts({}, {}))
        self._case = case

    async def generate(self, request: Request) -> AsyncGenerator[Event]:
        """Stream the answer of the case."""
        check(request, self.text.vocab, max_queue=16, max_seq_len=self.limits.max_seq_len)
        prompt = request.prompt.content if isinstance(request.prompt.content, str) else "??"
        yield AnswerStarted(request.id, self.catalog.get(request.model.name), 7, len(prompt), self.text)
        if request.sampling.prompt_logprobs is not None:
            yield PromptScores((Token(36), Token(37, -1.5, ((38, -0.25),))))
        steps = [answer.split("|") for answer in self._case.answers]
        for nth in range(max(map(len, steps), default=0)):
            for index, answer in enumerate(steps):
                yield AnswerDelta(answer[nth], self._tokens(answer[nth], request.sampling.logprobs), index)
        if self._case.failure:
            raise self._case.failure
        for index, answer in enumerate(steps):
            yield AnswerFinished(self._case.reason, "", len(prompt), 1, len("".join(answer)), index)

    def _tokens(self, text: str, logprobs: int | None) -> tuple[Token, ...]:
        ids = self.text.encode(text)
        if logprobs is None:
            return tuple(map(Token, ids))
        return tuple(Token(number, -0.5, ((number, -0.5),)[:logprobs]) for number in ids)


async def transcript(case: Case, folder: Path) -> bytes:
    """Return the body of the answer, with a fixed time and fixed ids."""
    write_tokenizer(folder)
    text = Text(Tokenizer.from_file(str(folder / "tokenizer.json")), None, VOCAB)
    transport = httpx.ASGITransport(create_app(Scripted(case, text)))
    async with httpx.AsyncClient(transport=transport, base_url="http://api") as client:
        answer = await client.post(PATHS[case.endpoint], json=case.body)
    fixed = re.sub(rb'"(created|created_at|completed_at)":\d+', rb'"\1":0', answer.content)
    fixed = re.sub(rb'"((?:chat)?cmpl-|call_|resp_|msg_|fc_|rs_)[0-9a-f]+"', rb'"\1ID"', fixed)
    fixed = re.sub(rb'"request_id":"[0-9a-f]+"', b'"request_id":"ID"', fixed)
    return fixed if answer.content.endswith(b"\n\n") else pretty(fixed)


def pretty(body: bytes) -> bytes:
    """Return JSON with a line for every value, so that a diff can be read."""
    return (json.dumps(json.loads(body), indent=1, ensure_ascii=False) + "\n").encode()


def path_of(name: str) -> Path:
    """Return where the transcript of a case is kept."""
    return FOLDER / f"{name}.{'sse' if CASES[name].body.get('stream') else 'json'}"
