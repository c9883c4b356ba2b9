"""Spans by OpenTelemetry; imported only where it is installed and asked for."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import grpc
import structlog
from opentelemetry import propagate
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer, format_trace_id
from structlog.contextvars import bound_contextvars

from loramux_shared.access.asgi import App, Message, Receive, Send
from loramux_shared.faults import Fault, InternalFault
from loramux_shared.tracing import TracingMaker

log = structlog.get_logger()

Value = str | int


@dataclass(frozen=True)
class OtelSpan:
    """The span of one call."""

    span: Span

    def note(self, name: str, value: Value) -> None:
        """Set an attribute."""
        self.span.set_attribute(name, value)

    def fail(self, reason: str) -> None:
        """Say that the call failed, and by which reason."""
        self.span.set_attribute("error.type", reason)
        self.span.set_status(Status(StatusCode.ERROR, reason))


class _ToLog(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        log.warning("tracing", problem=record.getMessage())


class Tracing:
    """Makes spans and sends them; the caller must close it, or the last ones are lost."""

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self.tracer: Tracer = provider.get_tracer("loramux")

    @classmethod
    def to(cls, exporter: SpanExporter, service: str) -> Tracing:
        """Send to an exporter in lots; OTEL_SERVICE_NAME and the like come before the service's name.

        What the SDK has to say, such as that nobody answers, is in the log like everything else.
        """
        logger = logging.getLogger("opentelemetry")
        logger.propagate = False
        logger.handlers = [_ToLog(logging.WARNING)]
        named = Resource.create()
        if str(named.attributes.get(SERVICE_NAME)).startswith("unknown_service"):
            named = named.merge(Resource({SERVICE_NAME: service}))
        provider = TracerProvider(resource=named, shutdown_on_exit=False)
        provider.add_span_processor(BatchSpanProcessor(exporter))
        return cls(provider)

    @contextmanager
    def call(
        self, name: str, headers: Mapping[str, str], attributes: Mapping[str, Value]
    ) -> Iterator[OtelSpan]:
        """Open the span of a call, below the one that its headers name (``traceparent``).

        Lines of the log that are written meanwhile carry ``trace_id``.
        """
        parent = propagate.extract(headers)
        with (
            self.tracer.start_as_current_span(
                name, parent, SpanKind.SERVER, attributes, record_exception=False, set_status_on_exception=False
            ) as span,
            bound_contextvars(trace_id=format_trace_id(span.get_span_context().trace_id)),
        ):
            yield OtelSpan(span)

    @contextmanager
    def of_call(self, headers: Mapping[str, str | bytes], method: str) -> Iterator[None]:
        """Open the span of a gRPC call; an exception marks it as failed, and is raised again."""
        texts = {name: value for name, value in headers.items() if isinstance(value, str)}
        service, _, name = method.strip("/").rpartition("/")
        attributes: dict[str, Value] = {"rpc.system": "grpc", "rpc.service": service, "rpc.method": name}
        with self.call(method.strip("/"), texts, attributes) as span:
            try:
                yield
            except Fault as fault:
                span.note("rpc.grpc.status_code", fault.status.value)
                span.fail(fault.reason)
                raise
            except (asyncio.CancelledError, GeneratorExit):
                span.note("rpc.grpc.status_code", grpc.StatusCode.CANCELLED.value[0])
                span.fail("CANCELLED")
                raise
            except Exception:
                span.note("rpc.grpc.status_code", InternalFault.status.value)
                span.fail(InternalFault.reason)
                raise
            span.note("rpc.grpc.status_code", grpc.StatusCode.OK.value[0])

    def over(self, app: App, paths: Collection[str]) -> App:
        """Return an HTTP application, with a span for every call of some paths."""

        async def traced(scope: Message, receive: Receive, send: Send) -> None:
            if scope["type"] != "http" or scope["path"] not in paths:
                await app(scope, receive, send)
                return
            headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
            attributes: dict[str, Value] = {"http.request.method": scope["method"], "url.path": scope["path"]}
            with self.call(f"{scope['method']} {scope['path']}", headers, attributes) as span:
                await app(scope, receive, _noting(span, send))

        return traced

    def watcher(self) -> Any:
        """Return what makes spans of a replica's requests."""
        from loramux_otel.requests import RequestSpans

        return RequestSpans(self.tracer)

    def close(self) -> None:
        """Send what is left; waits for it."""
        self._provider.shutdown()


def _noting(span: OtelSpan, send: Send) -> Send:
    async def noted(message: Message) -> None:
        if message["type"] == "http.response.start":
            span.note("http.response.status_code", message["status"])
            if message["status"] >= 500:
                span.fail(str(message["status"]))
        await send(message)

    return noted


TRACING: Final = TracingMaker(Tracing.to)
