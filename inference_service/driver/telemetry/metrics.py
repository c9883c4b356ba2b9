"""Metrics of requests, by model, in Prometheus' format."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Final, Protocol

from prometheus_client import (
    CollectorRegistry,
    Counter,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)

from inference_service.adapters.catalog import Catalog
from inference_service.adapters.manager import AdapterManager
from inference_service.core.request import AnswerDelta
from inference_service.driver.engine_thread import EngineThread
from inference_service.driver.telemetry.adapters import AdapterSeries
from inference_service.driver.telemetry.model_series import MOST, Counted, ModelSeries, Timed
from inference_service.driver.telemetry.record import RequestRecord
from inference_service.driver.telemetry.replica import ReplicaCollector

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
"""Content type; OpenMetrics takes twice the time to write and has no other content."""
PER_TOKEN_BUCKETS: Final = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1)
WAIT_BUCKETS: Final = (0.002, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 15, 60)
REQUEST_BUCKETS: Final = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320)
"""Bounds of the buckets, in seconds.

A model that was used has some 60 series of these; an unused one has none.
"""

# These metrics double the series of counters, and no dashboard reads them.
disable_created_metrics()  # type: ignore[no-untyped-call]


REQUESTS: Final = Counted("loramux_requests", "Requests that ended.", "outcome")
ANSWERS: Final = Counted("loramux_answers", "Complete answers; a request may want several.", "finish")
PROMPT: Final = Counted("loramux_prompt_tokens", "Prompt tokens, computed or cached.")
CACHED: Final = Counted("loramux_cached_prompt_tokens", "Prompt tokens found in the prefix cache.")
GENERATED: Final = Counted("loramux_generated_tokens", "Generated tokens.")
QUEUE: Final = Timed(
    "loramux_queue_seconds", "Time from the engine's receipt of a request to its first step.", WAIT_BUCKETS
)
TTFT: Final = Timed(
    "loramux_time_to_first_token_seconds", "Time from a request's arrival to its first token.", WAIT_BUCKETS
)
PER_TOKEN: Final = Timed(
    "loramux_time_per_output_token_seconds", "Mean time between the tokens of an answer.", PER_TOKEN_BUCKETS
)
DURATION: Final = Timed("loramux_request_seconds", "Time from a request's arrival to its end.", REQUEST_BUCKETS)


class Series(Protocol):
    """Counters and histograms by model."""

    def count(self, name: str, model: str, amount: int = 1, label: str = "") -> None:
        """Add to a counter."""

    def observe(self, name: str, model: str, seconds: float) -> None:
        """Add to a histogram."""


class RequestMetrics(ABC):
    """Counts requests in series, and answers of the HTTP server."""

    def __init__(self, series: Series) -> None:
        self._series = series

    def began(self, record: RequestRecord) -> None:
        """Count a prompt, and observe how long it waited."""
        for model in _models(record):
            self._series.count(PROMPT.name, model, record.prompt_tokens)
            self._series.count(CACHED.name, model, record.cached_tokens)
            self._observe(QUEUE, model, record.queue_s)
            self._observe(TTFT, model, record.ttft_s)

    def emitted(self, record: RequestRecord, delta: AnswerDelta) -> None:
        """Count tokens."""
        for model in _models(record):
            self._series.count(GENERATED.name, model, len(delta.tokens))

    def ended(self, record: RequestRecord) -> None:
        """Count a request and its answers, and observe how long they took."""
        for model in _models(record):
            self._ended(record, model)

    def _ended(self, record: RequestRecord, model: str) -> None:
        self._series.count(REQUESTS.name, model, label=record.outcome)
        if record.first_s is None:
            return
        self._observe(DURATION, model, record.duration_s)
        for answer in record.answers:
            if answer.finish is not None:
                self._series.count(ANSWERS.name, model, label=answer.finish.value)
            self._observe(PER_TOKEN, model, answer.seconds_per_token)

    @abstractmethod
    def responded(self, status: int) -> None:
        """Count an answer of the HTTP server; a request that it refuses itself never gets here."""

    def _observe(self, family: Timed, model: str, seconds: float | None) -> None:
        if seconds is not None:
            self._series.observe(family.name, model, seconds)


class Metrics(RequestMetrics):
    """Watch requests, and report what was seen and what the engine holds.

    The label ``model`` is a served name, or empty for a request that named none, and ``outcome`` is OK,
    CANCELLED or the reason of a fault: whatever clients send, there are no other series.
    """

    def __init__(
        self, catalog: Catalog, engine: EngineThread, adapters: AdapterManager, most: int = MOST
    ) -> None:
        """Show a replica's catalog, engine and adapters; at most so many models have series of their own."""
        self._registry = CollectorRegistry()
        self._registry.register(ReplicaCollector(catalog, engine, adapters.facts))
        ProcessCollector(registry=self._registry)
        self._responses = Counter(
            "loramux_http_responses", "Responses of the HTTP server.", ("status",), registry=self._registry
        )
        self._models = ModelSeries(
            (REQUESTS, ANSWERS, PROMPT, CACHED, GENERATED), (QUEUE, TTFT, PER_TOKEN, DURATION), most
        )
        self._adapters = AdapterSeries(catalog, engine, adapters, most)
        self._registry.register(self._adapters)
        super().__init__(self._models)

    def responded(self, status: int) -> None:
        """Count an answer of the HTTP server; a request that it refuses itself never gets here."""
        self._responses.labels(status).inc()

    def add(
        self,
        counts: Sequence[tuple[str, str, str, int]],
        seconds: Sequence[tuple[str, str, float]],
        statuses: Mapping[int, int],
    ) -> None:
        """Add what an API process counted and observed, and the statuses of its answers."""
        for name, model, label, amount in counts:
            self._models.count(name, model, amount, label)
        for name, model, each in seconds:
            self._models.observe(name, model, each)
        for status, amount in statuses.items():
            self._responses.labels(status).inc(amount)

    def render(self) -> bytes:
        """Return everything, as CONTENT_TYPE says."""
        library = generate_latest(self._registry)
        return b"".join(chain((library,), self._models.parts(), self._adapters.parts()))


def _models(record: RequestRecord) -> tuple[str, ...]:
    """The adapters of a mixture each count what it was: what clients write has no series of its own."""
    return record.model.names if record.model else ("",)
