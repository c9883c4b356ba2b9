"""What watching requests costs: per piece of an answer, per request, per scrape of a replica of 300 adapters.

Prints a table; no model is run.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import structlog
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from inference_service.core.sampling import SamplingParams
from inference_service.core.sequence import Adapter, FinishReason, Token
from inference_service.core.sequence import Sequence as EngineSequence
from inference_service.engine.engine import EngineStats, SequenceCounts
from inference_service.serving.catalog import Catalog, ServedModel
from inference_service.serving.request import Delta, Finished, Request
from inference_service.serving.telemetry.metrics import Metrics
from inference_service.serving.telemetry.record import Watcher, following
from inference_service.serving.telemetry.replica import EngineView
from inference_service.serving.telemetry.request_log import RequestLog
from inference_service.serving.telemetry.traces import RequestSpans
from loramux_shared.tracing.otel import Tracing

ADAPTERS, PIECES, ROUNDS = 300, 2000, 50


def main() -> None:
    """Measure everything."""
    with Path(os.devnull).open("w") as nowhere:
        structlog.configure(
            processors=[structlog.processors.TimeStamper(fmt="iso"), structlog.processors.JSONRenderer()],
            logger_factory=structlog.PrintLoggerFactory(nowhere),
        )
        _measure()


def _measure() -> None:
    models = [ServedModel(f"a{i}", Adapter("0" * 64, i), digest="0" * 64) for i in range(ADAPTERS)]
    stats = EngineStats(**dict.fromkeys(EngineStats.__dataclass_fields__, 8))
    engine = cast(EngineView, SimpleNamespace(stats=stats, sequence_counts=SequenceCounts({}, {})))
    metrics = Metrics(Catalog(1, "base", [ServedModel("base"), *models]), engine)
    tracing = Tracing.to(_Nowhere(), "benchmark")
    kinds: dict[str, list[Watcher]] = {
        "nobody watches": [],
        "metrics and log": [metrics, RequestLog()],
        "and spans": [metrics, RequestLog(), RequestSpans(tracing.tracer)],
    }
    print(f"{'':16} {'µs per piece':>13} {'µs per request':>15}")
    for name, watchers in kinds.items():
        costs = [_request(models[0], watchers) for _ in range(ROUNDS)]
        piece, request = (statistics.median(cost) * 1e6 for cost in zip(*costs, strict=True))
        print(f"{name:16} {piece:13.2f} {request:15.1f}")
    tracing.close()
    for model in models:
        _request(model, [metrics], pieces=3)
    scrape_s, gap_s = asyncio.run(_scrape(metrics))
    series = sum(not line.startswith(b"#") for line in metrics.render().splitlines())
    print(
        f"\n{series} series: {scrape_s * 1e3:.0f} ms a scrape, the loop stands still for {gap_s * 1e3:.0f} ms"
    )


class _Nowhere(SpanExporter):
    """An exporter that drops spans."""

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Drop."""
        del spans
        return SpanExportResult.SUCCESS


def _request(model: ServedModel, watchers: list[Watcher], pieces: int = PIECES) -> tuple[float, float]:
    """Return the seconds of one piece, and of a request without its pieces."""
    started, delta = time.perf_counter(), Delta("x", (Token(5),))
    with following(Request(model.name, "x"), watchers) as follower:
        follower.record.model = model
        seq = EngineSequence("0", [1, 2, 3], SamplingParams(), model.adapter)
        follower.submitted([seq])
        seq.began_s = time.monotonic()
        before = time.perf_counter()
        for _ in range(pieces):
            follower.see(delta)
        spent = time.perf_counter() - before
        follower.see(Finished(FinishReason.STOP, "", 3, 0, pieces))
    return spent / pieces, time.perf_counter() - started - spent


async def _scrape(metrics: Metrics) -> tuple[float, float]:
    """Return the seconds of a scrape on a thread, and the longest in which the event loop did nothing."""
    gaps: list[float] = []

    async def tick() -> None:
        last = time.perf_counter()
        while True:
            await asyncio.sleep(0.001)
            gaps.append(time.perf_counter() - last)
            last += gaps[-1]

    ticking = asyncio.create_task(tick())
    await asyncio.sleep(0.05)
    gaps.clear()
    started = time.perf_counter()
    await asyncio.to_thread(metrics.render)
    seconds = time.perf_counter() - started
    await asyncio.sleep(0.01)
    ticking.cancel()
    return seconds, max(gaps)


if __name__ == "__main__":
    main()
