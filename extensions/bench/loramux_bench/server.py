"""An OpenAI-compatible server: its models, and requests that are timed chunk by chunk."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
from pydantic import BaseModel, ValidationError
from pydantic_core import from_json

from loramux.cli.serving import no_such_model, unserved
from loramux_bench.records import Record
from loramux_bench.workload import BenchRequest
from loramux_shared.bundle.kinds import SILENT
from loramux_shared.faults import (
    Fault,
    ModelNotFound,
    PermissionDenied,
    RequestInvalid,
    ServerUnavailable,
    SettingsInvalid,
    Unauthenticated,
)

MODELS = "/v1/models"
COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
UNREACHED = ("CONNECT", "CUT_OFF")
"""Kinds of failures of a server that is gone."""
EXPECTED_URL = "expected http://HOST:PORT or https://HOST, of an OpenAI-compatible server"
MAX_PORT = 65535
NOT_THERE = (404, 405)
MAX_MESSAGE = 200
TEXTS = ("text", "content", "reasoning_content", "reasoning", "tool_calls")
"""Fields of a chunk that bring tokens."""


def split_url(url: str) -> tuple[str, str]:
    """Return a server's address and its endpoint, empty where the URL names none; or raise SettingsInvalid."""
    try:
        parts = httpx.URL(url)
    except httpx.InvalidURL:
        parts = httpx.URL()
    is_server = parts.scheme in ("http", "https") and parts.host and (parts.port or 1) <= MAX_PORT
    if not is_server or parts.userinfo or parts.query:
        raise SettingsInvalid(f"{url}: {EXPECTED_URL}")
    path = parts.path.rstrip("/")
    endpoint = next((each for each in (CHAT, COMPLETIONS) if path.endswith(each)), "")
    address = parts.copy_with(path=path.removesuffix(endpoint).removesuffix("/v1"), fragment=None)
    return str(address).rstrip("/"), endpoint


def _reason(error: httpx.TransportError) -> str:
    return str(error) or type(error).__name__


def _message(body: bytes) -> str:
    """Return what a server says in an answer that is none."""
    try:
        error = from_json(body)
        error = error.get("error", error.get("detail", error))
        message = error.get("message", error) if isinstance(error, dict) else error
    except (ValueError, AttributeError):
        message = body.decode(errors="replace")
    return str(message).strip()[:MAX_MESSAGE]


class _Model(BaseModel):
    id: str
    parent: str | None = None
    kinds: list[str] = []
    """Those of loramux, some of which generate no text."""


class _ModelList(BaseModel):
    data: list[_Model]


@dataclass
class Server:
    """The API of a server."""

    http: httpx.AsyncClient
    endpoint: str
    ignore_eos: bool

    async def models(self, requested: Sequence[str]) -> tuple[tuple[str, ...], str]:
        """Return the models to measure, and the base or the first model, for warm-ups.

        Raises:
            Fault: there is no list of models and none was requested, or one that was is not in it.
        """
        try:
            answer = await self.http.get(MODELS)
        except httpx.TransportError as error:
            missing = f"no answer from {self.http.base_url}: {_reason(error)}. {EXPECTED_URL}"
            raise ServerUnavailable(missing) from error
        if answer.status_code in NOT_THERE and requested:
            return tuple(dict.fromkeys(requested)), requested[0]
        if answer.status_code != 200:
            raise self._fault_of(answer.status_code, _message(answer.content), MODELS)
        try:
            listed = _ModelList.model_validate_json(answer.content).data
        except ValidationError as error:
            raise SettingsInvalid(f"{MODELS} of {self.http.base_url} lists none: {EXPECTED_URL}") from error
        served = [each.id for each in listed]
        for name in requested:
            if unknown := unserved(name, served):
                raise no_such_model(unknown[0], served)
        models = tuple(dict.fromkeys(requested or [x.id for x in listed if SILENT.isdisjoint(x.kinds)]))
        if not models:
            raise ModelNotFound(f"{self.http.base_url} lists no model that generates: name one with --model")
        parents = {each.parent for each in listed if each.parent in served}
        return models, min(filter(None, parents), default=models[0])

    async def try_out(self, request: BenchRequest) -> Record:
        """Send a request that must succeed; a server without completions is asked for chats from then on.

        Raises:
            Fault: it failed.
        """
        for endpoint in (self.endpoint,) if self.endpoint else (COMPLETIONS, CHAT):
            self.endpoint = endpoint
            record = await self.send(request, Record(0, request.model, 0.0), 0.0)
            if record.error not in ("HTTP_404", "HTTP_405"):
                break
        if record.error.startswith("HTTP_"):
            what = f"{self.endpoint}, model {request.model!r}"
            raise self._fault_of(int(record.error.removeprefix("HTTP_")), record.message, what)
        if record.error:
            failed = f"the first request to {self.http.base_url} failed"
            raise ServerUnavailable(f"{failed}: {record.error}: {record.message}")
        return record

    def _fault_of(self, status: int, message: str, what: str) -> Fault:
        found = f"{what} of {self.http.base_url}: status {status}: {message or 'no message'}"
        match status:
            case 401:
                return Unauthenticated(f"{found}. Give a key: --api-key KEY, or LORAMUX_API_KEY")
            case 403:
                return PermissionDenied(f"{found}. Use a key that may do this")
            case 404 | 405 if what == MODELS:
                return SettingsInvalid(
                    f"{found}. {EXPECTED_URL}; if it lists no models, name them with --model"
                )
            case 404:
                return ModelNotFound(found)
            case _ if status >= 500 or status == 429:
                return ServerUnavailable(found)
        return RequestInvalid(f"{found}. If it refuses ignore_eos, add --eos")

    async def send(self, request: BenchRequest, record: Record, begin: float) -> Record:
        """Send a request and return its record: what came when, in seconds of the event loop since begin."""
        now = asyncio.get_running_loop().time
        body: dict[str, Any] = {"model": request.model, "max_tokens": request.max_tokens}
        body |= {"stream": True, "stream_options": {"include_usage": True}, "temperature": 0}
        body |= {"ignore_eos": True} if self.ignore_eos else {}
        if self.endpoint == CHAT:
            text = [{"role": "user", "content": request.prompt}]
            body["messages"] = text if isinstance(request.prompt, str) else request.prompt
        else:
            body["prompt"] = request.prompt
        try:
            async with self.http.stream("POST", self.endpoint or COMPLETIONS, json=body) as response:
                if response.status_code != 200:
                    record.error = f"HTTP_{response.status_code}"
                    record.message = _message(await response.aread())
                elif "text/event-stream" not in (found := response.headers.get("content-type", "")):
                    record.error, record.message = (
                        "NO_STREAM",
                        f"expected text/event-stream, found {found[:80]}",
                    )
                else:
                    await _read(response, record, lambda: now() - begin)
        except (ValueError, TypeError, AttributeError):
            record.error, record.message = "BAD_STREAM", "an event of the stream is no chunk of an answer"
        except httpx.TransportError as error:
            connecting = isinstance(error, httpx.ConnectError | httpx.ConnectTimeout)
            timed_out = isinstance(error, httpx.TimeoutException)
            record.error = "CONNECT" if connecting else "TIMEOUT" if timed_out else "CUT_OFF"
            record.message = _reason(error)
        record.end_s = now() - begin
        return record


async def _read(response: httpx.Response, record: Record, now: Callable[[], float]) -> None:
    """Read a stream of events to its end; each has the time at which its bytes arrived."""
    rest, ended = b"", False
    async for data in response.aiter_raw():
        at_s = now()
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            if not line.startswith(b"data:"):
                continue
            if (payload := line[5:].strip()) == b"[DONE]":
                ended = True
            else:
                ended |= add_event(from_json(payload), record, at_s)
    record.tokens = record.tokens or record.chunks
    if not record.error and not ended:
        record.error, record.message = "CUT_OFF", "the stream ended before the answer did"


def add_event(event: dict[str, Any], record: Record, at_s: float) -> bool:
    """Count an event of a stream; return True if it says that the answer is whole."""
    if error := event.get("error"):
        message = error.get("message", error) if isinstance(error, dict) else error
        record.error, record.message = "STREAM_ERROR", str(message)[:MAX_MESSAGE]
    if usage := event.get("usage"):
        _add_usage(usage, record)
    ended = False
    for choice in event.get("choices") or ():
        part = choice.get("delta") or choice
        ended |= bool(choice.get("finish_reason"))
        if _has_token(part, ended=ended):
            record.add_chunk(at_s)
    return ended


def _add_usage(usage: dict[str, Any], record: Record) -> None:
    record.tokens = usage.get("completion_tokens") or 0
    record.has_usage = record.tokens > 0
    record.prompt_tokens = usage.get("prompt_tokens") or 0
    record.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0


def _has_token(part: dict[str, Any], *, ended: bool) -> bool:
    """Return True for a part with a token; an empty text is one, unless it opens or closes a stream."""
    texts = [part[name] for name in TEXTS if part.get(name) is not None]
    return any(texts) or (bool(texts) and not ended and "role" not in part)
