"""The watchers of requests beside the metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING

from inference_service.serving.telemetry.record import Watcher
from inference_service.serving.telemetry.request_log import RequestLog

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer


def open_watchers(tracer: Tracer | None = None, *, log_prompts: bool = False) -> list[Watcher]:
    """Return the log of requests, and with a tracer their spans."""
    watchers: list[Watcher] = [RequestLog(texts=log_prompts)]
    if tracer is not None:
        from inference_service.serving.telemetry.traces import RequestSpans

        watchers.append(RequestSpans(tracer))
    return watchers
