"""The spans of an HTTP application."""

from __future__ import annotations

from collections.abc import Collection

from loramux_shared.access.asgi import App, Message, Receive, Send
from loramux_shared.tracing.door import CallSpan, DoorSpans, Value


class TraceMiddleware:
    """Makes a span for every call of some paths; it ends when the last byte of the answer is sent."""

    def __init__(self, app: App, spans: DoorSpans, paths: Collection[str]) -> None:
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
