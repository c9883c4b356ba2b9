"""Where adapters are: in all as the library tells it, and of each that is in the bank or at work."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from inference_service.engine.engine import SequenceCounts
from inference_service.engine.residency_entry import LOAD_BUCKETS_S
from inference_service.engine.residents import State
from inference_service.serving.adapters.manager import AdapterManager
from inference_service.serving.adapters.views import PLACES, Place
from inference_service.serving.catalog import Catalog, ServedModel
from inference_service.serving.telemetry.replica import EngineView
from inference_service.serving.telemetry.text_format import bounds_of, gauges

MOST: Final = 500
"""Models that have series of their own: those that were used last."""
MOST_NAMED: Final = 2000
"""Names in one label."""
LEVELS: Final = {Place.DEVICE: "gpu", Place.HOST: "cpu"}
"""vLLM's words; on a machine without a GPU the bank is the host's, and what is in it is ready all the same."""

Limits = Callable[[str], Mapping[str, float]]
"""The limits of a model: weight, max_running and so on, those that are set."""


def no_limits(model: str) -> Mapping[str, float]:  # noqa: ARG001 - it has none
    """None is set."""
    return {}


@dataclass(frozen=True)
class _Shown:
    model: ServedModel
    place: Place
    used_s: float


class AdapterSeries:
    """Series of the models that are in memory or at work; there are none of those that are only registered."""

    def __init__(self, catalog: Catalog, engine: EngineView, adapters: AdapterManager) -> None:
        self._catalog = catalog
        self._engine = engine
        self.adapters = adapters
        self._limits: Limits = no_limits

    def show(self, adapters: AdapterManager, limits: Limits) -> None:
        """Ask these from now on."""
        self.adapters, self._limits = adapters, limits

    def render(self) -> str:
        """Return everything, as Prometheus reads it."""
        shown, sequences = self._shown(), self._engine.sequence_counts
        return "".join((*self._models(shown[:MOST], sequences), *self._for_gateways(shown, sequences)))

    def _shown(self) -> list[_Shown]:
        """Those in memory and at work, used last first; a scrape looks at each name once and no longer."""
        standings = {each.adapter: each for each in self.adapters.residency.standings()}
        found = []
        for model in self._catalog.everything:
            if model.adapter is None:
                found.append(_Shown(model, Place.DEVICE, math.inf))
            elif (standing := standings.get(model.adapter)) is not None:
                at_work = standing.in_flight or standing.waiting
                if standing.state is not State.ABSENT or at_work:
                    found.append(_Shown(model, PLACES[standing.state], standing.last_used_s or 0.0))
        return sorted(found, key=lambda each: -each.used_s)

    def _models(self, shown: list[_Shown], sequences: SequenceCounts) -> Iterator[str]:
        models = sorted((each.model for each in shown), key=lambda model: model.name)
        for name, text, counts in (
            ("running", "Sequences that steps compute.", sequences.running),
            ("waiting", "Sequences that wait for a place.", sequences.waiting),
        ):
            rows = (({"model": model.name}, counts.get(model.name, 0)) for model in models)
            yield from gauges(f"loramux_sequences_{name}", text, rows)
        yield from gauges(
            "loramux_model_load_seconds",
            "Reading, checking and packing a model.",
            (({"model": model.name}, model.load_s) for model in models),
        )
        yield from gauges(
            "loramux_model_info",
            "1; the base's digest is empty.",
            (({"model": model.name, "digest": model.digest[:12]}, 1) for model in models),
        )
        yield from gauges(
            "loramux_model_limit",
            "Limits that are set.",
            (
                ({"model": model.name, "limit": limit}, value)
                for model in models
                for limit, value in self._limits(model.name).items()
            ),
        )

    def _for_gateways(self, shown: list[_Shown], sequences: SequenceCounts) -> Iterator[str]:
        """Yield the names that vLLM gave them; of the base there are none."""
        adapters = [each for each in shown if each.model.name != self._catalog.base_name]
        yield from gauges(
            "vllm:lora_adapter_loaded",
            "1; the level is gpu where the adapter is ready to be computed with, cpu on its way there.",
            (
                (self._loaded_labels(each), 1)
                for each in sorted(adapters[:MOST], key=lambda each: each.model.name)
                if each.place in LEVELS
            ),
        )
        ready = {each.model.name for each in adapters if each.place is Place.DEVICE}
        waiting = {each.model.name for each in adapters} & sequences.waiting.keys()
        labels = {
            "max_lora": str(self._engine.stats.max_adapters),
            "running_lora_adapters": ",".join(sorted(ready)[:MOST_NAMED]),
            "waiting_lora_adapters": ",".join(sorted(waiting)[:MOST_NAMED]),
        }
        yield from gauges(
            "vllm:lora_requests_info",
            "When this was so, in Unix time; adapters that are ready, and those that sequences wait for.",
            [(labels, time.time())],
        )

    def _loaded_labels(self, each: _Shown) -> dict[str, str]:
        pinned = str(self.adapters.is_pinned(each.model.name)).lower()
        return {"adapter_name": each.model.name, "level": LEVELS[each.place], "pinned": pinned}


class AdapterCollector(Collector):
    """What there is of adapters in all."""

    def __init__(self, series: AdapterSeries) -> None:
        self._series = series

    def collect(self) -> Iterator[Metric]:
        """Yield every family."""
        manager = self._series.adapters
        view, stats = manager.replica(), manager.residency.stats
        for name, text, value in (
            ("loramux_adapters_registered", "Names of adapters.", view.registered),
            ("loramux_adapters_resident", "Versions in the bank.", view.resident),
            ("loramux_adapters_arriving", "Versions on their way into it.", view.arriving),
            ("loramux_adapters_pinned", "Names that are pinned.", view.pinned),
            ("loramux_bank_bytes", "Memory for adapters.", view.bank_bytes),
            ("loramux_bank_used_bytes", "Of it, what resident adapters take.", view.bank_used),
            ("loramux_generation", "The deployment's generation that is served.", view.generation),
            ("loramux_newest_generation", "The newest generation that was seen.", view.newest),
            ("loramux_paused", "1 while an operator lets all sequences stand still.", view.paused),
            ("vllm:num_gpu_loaded_lora_adapters", "Versions that are ready to compute with.", view.resident),
            ("vllm:num_cpu_loaded_lora_adapters", "Versions on their way there.", view.arriving),
        ):
            yield GaugeMetricFamily(name, text, value)
        for name, text, value in (
            ("loads", "Versions that came into the bank.", stats.loads),
            ("load_failures", "Loads that failed.", stats.failures),
            ("evictions", "Versions that had to leave it.", stats.evictions),
            ("load_waits", "Sequences whose adapter was not there when they came.", stats.waits),
        ):
            yield CounterMetricFamily(f"loramux_adapter_{name}", text, value)
        state = GaugeMetricFamily(
            "loramux_replica_state", "1; how it stands to its deployment.", labels=["state"]
        )
        state.add_metric([view.state], 1)
        yield state
        yield _load_seconds(stats.load_counts, stats.load_seconds)


def _load_seconds(counts: list[int], total: float) -> Metric:
    added, buckets = 0, []
    for bound, count in zip(bounds_of(LOAD_BUCKETS_S), counts, strict=True):
        added += count
        buckets.append((bound, float(added)))
    return HistogramMetricFamily(
        "vllm:lora_adapter_load_seconds",
        "From the begin of a load until the version is in the bank.",
        buckets=buckets,
        sum_value=total,
    )
