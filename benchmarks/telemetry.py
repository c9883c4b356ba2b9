"""What watching requests costs: per piece of an answer, per request, per scrape with 1,000 adapters in use.

Prints a table; no model is run.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import sys
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
from inference_service.replica import SWITCH_S
from inference_service.serving.catalog import Catalog, ServedModel
from inference_service.serving.request import Delta, Finished, Request
from inference_service.serving.telemetry.metrics import Metrics
from inference_service.serving.telemetry.record import Watcher, following
from inference_service.serving.telemetry.replica import EngineView
from inference_service.serving.telemetry.request_log import RequestLog
from inference_service.serving.telemetry.traces import RequestSpans
from loramux_shared.tracing.otel import Tracing

ADAPTERS, PIECES, ROUNDS, SCRAPES = 1000, 2000, 50, 9
BARS_MS = {0: 20, 16: 20, ADAPTERS: 100}
"""Of a scrape, by the adapters that were used since the last one."""


def main() -> None:
    """Measure everything."""
    sys.setswitchinterval(SWITCH_S)
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
    data = metrics.render()
    series = sum(not line.startswith(b"#") for line in data.splitlines())
    told = f"{series} series, {len(data) / 1e6:.2f} MB"
    print(f"\n{told:38} {'ms of CPU':>13} {'at most':>9} {'ms loop still':>15}")
    for used, bar_ms in BARS_MS.items():
        scrapes = []
        for _ in range(SCRAPES):
            for model in models[:used]:
                _request(model, [metrics], pieces=3)
            scrapes.append(asyncio.run(_scrape(metrics)))
        cpu_ms, gap_ms = (statistics.median(each) * 1e3 for each in zip(*scrapes, strict=True))
        print(f"a scrape, {used:4} used since the last one {cpu_ms:13.1f} {bar_ms:9} {gap_ms:15.1f}")


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
    """Return the thread's seconds for a scrape, and the longest in which the event loop did nothing."""
    gaps: list[float] = []

    async def tick() -> None:
        last = time.perf_counter()
        while True:
            await asyncio.sleep(0.001)
            gaps.append(time.perf_counter() - last)
            last += gaps[-1]

    def render() -> float:
        before_s = time.thread_time()
        metrics.render()
        return time.thread_time() - before_s

    ticking = asyncio.create_task(tick())
    await asyncio.sleep(0.05)
    gaps.clear()
    cpu_s = await asyncio.to_thread(render)
    await asyncio.sleep(0.01)
    ticking.cancel()
    return cpu_s, max(gaps)


if __name__ == "__main__":
    main()
