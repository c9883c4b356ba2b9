"""Spans of calls: the interface for servers, and the spans of an HTTP application."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager
from typing import Protocol

from loramux_shared.access.asgi import App, Message, Receive, Send

Value = str | int


class CallSpan(Protocol):
    """The span of one call."""

    def note(self, name: str, value: Value) -> None:
        """Set an attribute."""
        ...

    def fail(self, reason: str) -> None:
        """Say that the call failed, and by which reason."""
        ...


class ServerSpans(Protocol):
    """A factory of the spans of a server's calls."""

    def call(
        self, name: str, headers: Mapping[str, str], attributes: Mapping[str, Value]
    ) -> AbstractContextManager[CallSpan]:
        """Open the span of a call, below the one that its headers name (``traceparent``).

        Inside the block it is the current one, and ends with it.
        """
        ...


class TraceMiddleware:
    """Makes a span for every call of some paths; it ends when the last byte of the answer is sent."""

    def __init__(self, app: App, spans: ServerSpans, paths: Collection[str]) -> None:
        self._app = app
        self._spans = spans
        self._paths = paths

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http" or scope["path"] not in self._paths:
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        attributes: dict[str, Value] = {"http.request.method": scope["method"], "url.path": scope["path"]}
        with self._spans.call(f"{scope['method']} {scope['path']}", headers, attributes) as span:
            await self._app(scope, receive, _noting(span, send))


def _noting(span: CallSpan, send: Send) -> Send:
    async def noted(message: Message) -> None:
        if message["type"] == "http.response.start":
            span.note("http.response.status_code", message["status"])
            if message["status"] >= 500:
                span.fail(str(message["status"]))
        await send(message)

    return noted
