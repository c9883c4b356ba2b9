"""Traces: the standard OTEL_* variables switch them on, and an extension makes them."""

import os
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, Final, Protocol

import structlog

from loramux_shared.access.asgi import App
from loramux_shared.ports import registered

ENDPOINTS: Final = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
EXPORTERS: Final = "opentelemetry_traces_exporter"
OTLP: Final = {"http/protobuf": "otlp_proto_http", "grpc": "otlp_proto_grpc"}
"""The exporter of each OTEL_EXPORTER_OTLP_PROTOCOL; the extra brings the first, which is the default here."""

log = structlog.get_logger()


class Tracing(Protocol):
    """Makes spans and sends them.

    The span of a call is below the one that its headers name (``traceparent``), and is the current one until
    the last byte of the answer is sent.
    """

    def of_call(self, headers: Mapping[str, str | bytes], method: str) -> AbstractContextManager[None]:
        """Open the span of a gRPC call; an exception marks it as failed."""
        ...

    def over(self, app: App, paths: Collection[str]) -> App:
        """Return an HTTP application, with a span for every call of some paths."""
        ...

    def watcher(self) -> Any:
        """Return what makes spans of a replica's requests, a `Watcher`."""
        ...

    def close(self) -> None:
        """Send what is left; waits for it."""
        ...


@dataclass(frozen=True)
class TracingMaker:
    """The port of what makes spans."""

    open_tracing: Callable[[Any, str], Tracing]
    """Called with an exporter of OpenTelemetry, and the name of the service."""


def open_tracing(service: str) -> Tracing | None:
    """Return tracing, None unless OTEL_* variables ask for it; the log says when it cannot be had.

    It is asked for by an OTLP endpoint, or by OTEL_TRACES_EXPORTER, unless that is ``none`` or
    OTEL_SDK_DISABLED is ``true``. Sampling, batching, headers and resource are what the SDK reads from its own
    variables.
    """
    exporter = _requested_exporter()
    if not exporter:
        return None
    found, makers = list(entry_points(group=EXPORTERS, name=exporter)), registered("tracing", TracingMaker)
    if not found or not makers:
        cure = "pip install 'loramux[otel]', or unset the OTEL_ variables"
        log.warning("traces are requested, but the exporter is not installed", exporter=exporter, cure=cure)
        return None
    [maker, *_] = makers.values()
    tracing = maker.open_tracing(found[0].load()(), service)
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
