"""An OpenAI-compatible server of known delays: behind a transport in virtual time, and behind a socket."""

import asyncio
import json
import selectors
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from http.server import ThreadingHTTPServer
from typing import Any

import httpx

from tests.support.http_server import QuietHandler

SSE = "text/event-stream"


class Cut(Exception):
    """The server dies."""


@dataclass
class FakeOpenAI:
    """Delays in seconds, and what else a server may do."""

    models: tuple[str, ...] = ("base", "a", "b")
    first_s: float = 0.0
    token_s: float = 0.0
    cold_s: dict[str, float] = field(default_factory=dict)
    """Delay of the first request of a model."""
    slow_s: dict[str, float] = field(default_factory=dict)
    """Delay of every request of a model."""
    per_chunk: int = 1
    has_usage: bool = True
    key: str = ""
    lists: bool = True
    chat_only: bool = False
    dies_after: int | None = None
    """Requests that it answers before it dies in the middle of one, and refuses connections."""
    refused: dict[str, tuple[int, Any]] = field(default_factory=dict)
    streamed: dict[str, list[Any]] = field(default_factory=dict)
    """Events of a model, in place of an answer."""
    requests: list[dict[str, Any]] = field(default_factory=list)

    def answer(self, path: str, key: str, body: dict[str, Any]) -> Iterator[tuple[int, str] | float | bytes]:
        """Yield the status and the type, then bytes and the pauses between them."""
        if self.key and key != f"Bearer {self.key}":
            yield from _plain(401, {"error": {"message": "no such key"}})
        elif path == "/v1/models":
            yield from _plain(200 if self.lists else 404, self._listed())
        elif self.chat_only and "chat" not in path:
            yield from _plain(404, {"detail": "Not Found"})
        elif body["model"] in self.refused:
            yield from _plain(*self.refused[body["model"]])
        elif body["model"] not in self.models:
            yield from _plain(404, {"error": {"message": f"no model {body['model']}"}})
        else:
            self.requests.append(body)
            yield from self._stream(body)

    def _listed(self) -> dict[str, Any]:
        parents = [None, *([self.models[0]] * (len(self.models) - 1))] if self.models else []
        return {"data": [{"id": each, "parent": of} for each, of in zip(self.models, parents, strict=True)]}

    def _stream(self, body: dict[str, Any]) -> Iterator[tuple[int, str] | float | bytes]:
        model, chat = body["model"], "messages" in body
        if self.dies_after is not None and len(self.requests) > self.dies_after + 1:
            raise ConnectionRefusedError("refused")
        yield 200, SSE
        yield self.first_s + self.cold_s.pop(model, 0.0) + self.slow_s.get(model, 0.0)
        if model in self.streamed:
            yield b"".join(map(event, self.streamed[model]))
            return
        if chat:
            yield event({"choices": [{"delta": {"role": "assistant", "content": ""}, "finish_reason": None}]})
        for index in range(0, body["max_tokens"], self.per_chunk):
            if index:
                yield self.token_s * self.per_chunk
            part = {"delta": {"content": "x"}} if chat else {"text": "x"}
            yield event({"choices": [part | {"finish_reason": None}]})
            if self.dies_after is not None and len(self.requests) > self.dies_after:
                raise Cut
        yield event({"choices": [({"delta": {}} if chat else {"text": ""}) | {"finish_reason": "length"}]})
        if self.has_usage:
            words = len(json.dumps(body.get("prompt") or body["messages"][-1]["content"]).split())
            details = {"prompt_tokens": 2 * words + 5, "completion_tokens": body["max_tokens"]}
            yield event({"choices": [], "usage": details | {"prompt_tokens_details": {"cached_tokens": 2}}})
        yield event("[DONE]")


def _plain(status: int, document: Any) -> Iterator[tuple[int, str] | bytes]:
    yield status, "application/json"
    yield json.dumps(document).encode()


def event(document: Any) -> bytes:
    """Return an event of a stream."""
    text = document if isinstance(document, str) else json.dumps(document)
    return f"data: {text}\n\n".encode()


class FakeTransport(httpx.AsyncBaseTransport):
    """The server without a network: its pauses are those of the event loop."""

    def __init__(self, fake: FakeOpenAI) -> None:
        self._fake = fake

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Answer, once the first bytes are there."""
        body = json.loads(await request.aread() or b"{}")
        steps = self._fake.answer(request.url.path, request.headers.get("authorization", ""), body)
        try:
            status, kind = next(steps)
        except ConnectionRefusedError as error:
            raise httpx.ConnectError(str(error)) from error
        return httpx.Response(status, headers={"content-type": kind}, stream=_Stream(steps))


class _Stream(httpx.AsyncByteStream):
    def __init__(self, steps: Iterator[Any]) -> None:
        self._steps = steps

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            for step in self._steps:
                if isinstance(step, bytes):
                    yield step
                else:
                    await asyncio.sleep(step)
        except Cut:
            raise httpx.ReadError("connection reset") from None


def socket_server(fake: FakeOpenAI) -> ThreadingHTTPServer:
    """Return the server behind a socket, to be served by `serve_http`."""

    class Handler(QuietHandler):
        def do_GET(self) -> None:  # noqa: N802 - the base class's name
            length = int(self.headers.get("content-length", 0))
            body = json.loads(self.rfile.read(length) or b"{}")
            try:
                for step in fake.answer(self.path, self.headers.get("authorization", ""), body):
                    if isinstance(step, tuple):
                        self.send_response(step[0])
                        self.send_header("content-type", step[1])
                        self.end_headers()
                    elif isinstance(step, bytes):
                        self.wfile.write(step)
                    elif step:
                        time.sleep(step)
            except (Cut, OSError):
                self.close_connection = True

        do_POST = do_GET  # noqa: N815 - likewise

    return ThreadingHTTPServer(("127.0.0.1", 0), Handler)


class _Skipping(selectors.DefaultSelector):
    """A selector that does not wait: the time of its loop goes on in place of that."""

    now_s = 0.0

    def select(self, timeout: float | None = None) -> Any:
        """Return what is ready."""
        found = super().select(None if timeout is None else 0)
        if not found and timeout is not None and timeout > 0:
            self.now_s += timeout
        return found


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose sleeps take no time, and whose clock counts them."""

    def __init__(self) -> None:
        self._skipping = _Skipping()
        super().__init__(self._skipping)

    def time(self) -> float:
        """Return the seconds that were slept."""
        return self._skipping.now_s

    def block(self, seconds: float) -> None:
        """Let time pass as work on the loop does."""
        self._skipping.now_s += seconds
