"""Traces: the standard OTEL_* variables switch them on; spans of calls, and those of an HTTP application."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager
from importlib.metadata import entry_points
from typing import Any, Final, Protocol

import structlog

from loramux_shared.access.asgi import App, Message, Receive, Send
from loramux_shared.extensions import PARTS, find_extensions, need_extension

ENDPOINTS: Final = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
EXPORTERS: Final = "opentelemetry_traces_exporter"
OTLP: Final = {"http/protobuf": "otlp_proto_http", "grpc": "otlp_proto_grpc"}
"""The exporter of each OTEL_EXPORTER_OTLP_PROTOCOL; the extra brings the first, which is the default here."""

log = structlog.get_logger()

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


class Tracing(ServerSpans, Protocol):
    """The extension that makes spans and sends them."""

    def watcher(self) -> Any:
        """Return what makes spans of a replica's requests, a `Watcher`."""
        ...

    def close(self) -> None:
        """Send what is left; waits for it."""
        ...


def open_tracing(service: str) -> Tracing | None:
    """Return tracing, None unless OTEL_* variables ask for it; the log says when it cannot be had.

    It is asked for by an OTLP endpoint, or by OTEL_TRACES_EXPORTER, unless that is ``none`` or
    OTEL_SDK_DISABLED is ``true``. Sampling, batching, headers and resource are what the SDK reads from its own
    variables.
    """
    exporter = _requested_exporter()
    if not exporter:
        return None
    found = list(entry_points(group=EXPORTERS, name=exporter))
    if not (found and "otel" in find_extensions(PARTS)):
        cure = "pip install 'loramux[otel]', or unset the OTEL_ variables"
        log.warning("traces are requested, but the exporter is not installed", exporter=exporter, cure=cure)
        return None
    tracing: Tracing = need_extension("otel", "traces").Tracing.to(found[0].load()(), service)
    log.info("traces are exported", exporter=exporter)
    return tracing


def _requested_exporter() -> str:
    """Return the name of the exporter that is asked for; empty for none."""
    exporter = os.environ.get("OTEL_TRACES_EXPORTER", "")
    if os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true" or exporter == "none":
        return ""
    if exporter not in ("", "otlp"):
        return exporter
    if not exporter and not any(map(os.environ.get, ENDPOINTS)):
        return ""
    traces = os.environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "")
    protocol = traces or os.environ.get("OTEL_EXPORTER_OTLP_PROTOCOL", "")
    return OTLP.get(protocol or "http/protobuf", protocol)


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
