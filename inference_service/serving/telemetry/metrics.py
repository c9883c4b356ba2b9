"""Metrics of requests, by model, in Prometheus' format."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)

from inference_service.serving.catalog import Catalog
from inference_service.serving.request import Delta
from inference_service.serving.telemetry.record import Record
from inference_service.serving.telemetry.replica import EngineView, ReplicaCollector

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
"""OpenMetrics takes twice the time to write and says no more."""
PACE_BUCKETS: Final = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1)
WAIT_BUCKETS: Final = (0.002, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 15, 60)
REQUEST_BUCKETS: Final = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320)
"""In seconds. A model that was used has some 60 series of these; one that was not has none."""

# They double the series of counters, and nobody reads them.
disable_created_metrics()  # type: ignore[no-untyped-call]


class Metrics:
    """Watches requests, and tells what it saw and what the engine holds.

    The label ``model`` is a served name, or empty for a request that named none, and ``outcome`` is OK,
    CANCELLED or the reason of a fault: whatever clients send, there are no other series.
    """

    def __init__(self, catalog: Catalog, engine: EngineView) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(ReplicaCollector(catalog, engine))
        ProcessCollector(registry=self._registry)
        self._requests = self._counter("requests", "Requests that ended.", "outcome")
        self._responses = Counter(
            "loramux_http_responses", "Answers of the HTTP door.", ("status",), registry=self._registry
        )
        self._answers = self._counter("answers", "Complete answers; a request may want several.", "finish")
        self._prompt = self._counter("prompt_tokens", "Tokens of prompts that were computed or cached.")
        self._cached = self._counter("cached_prompt_tokens", "Of them, tokens that the prefix cache held.")
        self._generated = self._counter("generated_tokens", "Tokens of answers.")
        self._said: dict[str, Counter] = {}
        self._queue = self._histogram("queue", "Until the first step for it, of requests.", WAIT_BUCKETS)
        self._ttft = self._histogram(
            "time_to_first_token", "From arrival to the first token, of requests.", WAIT_BUCKETS
        )
        self._pace = self._histogram(
            "time_per_output_token", "Between tokens, mean of an answer.", PACE_BUCKETS
        )
        self._duration = self._histogram("request", "From arrival to end, of requests.", REQUEST_BUCKETS)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"loramux_{name}", text, ("model", *labels), registry=self._registry)

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(f"loramux_{name}_seconds", text, ("model",), registry=self._registry, buckets=buckets)

    def began(self, record: Record) -> None:
        """Count a prompt, and observe how long it waited."""
        model = _model(record)
        self._prompt.labels(model).inc(record.prompt_tokens)
        self._cached.labels(model).inc(record.cached_tokens)
        _observe(self._queue, model, record.queue_s)
        _observe(self._ttft, model, record.ttft_s)

    def said(self, record: Record, delta: Delta) -> None:
        """Count tokens."""
        model = _model(record)
        if model not in self._said:  # `labels` takes longer than all the rest
            self._said[model] = self._generated.labels(model)
        self._said[model].inc(len(delta.tokens))

    def ended(self, record: Record) -> None:
        """Count a request and its answers, and observe how long they took."""
        model = _model(record)
        self._requests.labels(model, record.outcome).inc()
        if record.first_s is None:
            return
        _observe(self._duration, model, record.duration_s)
        for answer in record.answers:
            if answer.finish is not None:
                self._answers.labels(model, answer.finish.value).inc()
            _observe(self._pace, model, answer.pace_s)

    def responded(self, status: int) -> None:
        """Count an answer of the HTTP door; what it refuses itself never becomes a request here."""
        self._responses.labels(status).inc()

    def render(self) -> bytes:
        """Return everything, as CONTENT_TYPE says."""
        return generate_latest(self._registry)


def _model(record: Record) -> str:
    return record.model.name if record.model else ""


def _observe(histogram: Histogram, model: str, seconds: float | None) -> None:
    if seconds is not None:
        histogram.labels(model).observe(seconds)
