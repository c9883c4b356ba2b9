"""What the engine holds at the moment of a scrape, and what inference gateways read of it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import Protocol

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from inference_service.engine.engine import EngineStats, SequenceCounts
from inference_service.serving.catalog import Catalog, ServedModel


class EngineView(Protocol):
    """An engine that can be looked at from outside."""

    @property
    def stats(self) -> EngineStats:
        """A snapshot."""
        ...

    @property
    def sequence_counts(self) -> SequenceCounts:
        """Who runs and who waits."""
        ...


class ReplicaCollector(Collector):
    """Asks the engine anew at every scrape."""

    def __init__(self, catalog: Catalog, engine: EngineView) -> None:
        self._catalog = catalog
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        """Yield every family."""
        stats, sequences = self._engine.stats, self._engine.sequence_counts
        models = self._catalog.everything
        yield from self._sequences(sequences, models)
        yield from _memory(stats)
        yield from self._loaded(models)
        yield from _for_gateways(stats)
        yield self._lora_requests(stats, sequences)

    def _sequences(self, sequences: SequenceCounts, models: Sequence[ServedModel]) -> Iterator[Metric]:
        for name, text, counts in (
            ("running", "Sequences that steps compute.", sequences.running),
            ("waiting", "Sequences that wait for a place.", sequences.waiting),
        ):
            family = GaugeMetricFamily(f"loramux_sequences_{name}", text, labels=["model"])
            for model in models:
                family.add_metric([model.name], counts.get(model.name, 0))
            yield family

    def _loaded(self, models: Sequence[ServedModel]) -> Iterator[Metric]:
        adapters = [model for model in models if model.name != self._catalog.base_name]
        yield GaugeMetricFamily("loramux_adapters_resident", "Adapters in memory.", len(adapters))
        yield GaugeMetricFamily(
            "loramux_load_seconds", "From the start of loading until it was ready.", self._catalog.load_s
        )
        family = GaugeMetricFamily(
            "loramux_model_load_seconds", "Reading, checking and packing a model.", labels=["model"]
        )
        for model in models:
            family.add_metric([model.name], model.load_s)
        yield family
        info = GaugeMetricFamily(
            "loramux_model_info", "1; the base's digest is empty.", labels=["model", "digest"]
        )
        for model in models:
            info.add_metric([model.name, model.digest[:12]], 1)
        yield info
        build = GaugeMetricFamily("loramux_build_info", "1.", labels=["version", "generation"])
        build.add_metric([version("loramux"), str(self._catalog.generation)], 1)
        yield build

    def _lora_requests(self, stats: EngineStats, sequences: SequenceCounts) -> Metric:
        family = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "When this was so, in Unix time; the adapters of sequences, separated by commas.",
            labels=["max_lora", "running_lora_adapters", "waiting_lora_adapters"],
        )
        base = self._catalog.base_name
        running, waiting = _listed(sequences.running, base), _listed(sequences.waiting, base)
        family.add_metric([str(stats.max_adapters), running, waiting], time.time())
        return family


def _listed(counts: Mapping[str, int], base: str) -> str:
    """Name the adapters that are counted."""
    return ",".join(sorted(name for name in counts if name != base))


def _memory(stats: EngineStats) -> Iterator[Metric]:
    used = stats.blocks_total - stats.blocks_free
    for name, text, value in (
        ("kv_cache_blocks", "Blocks of the key-value cache.", stats.blocks_total),
        ("kv_cache_blocks_used", "Of them, blocks that sequences hold.", used),
    ):
        yield GaugeMetricFamily(f"loramux_{name}", text, value)
    for name, text, value in (
        ("preemptions", "Sequences that gave their blocks back and were computed again.", stats.preemptions),
        ("prefix_cache_queried_tokens", "Tokens of admitted sequences.", stats.prefix_tokens_queried),
        ("prefix_cache_hit_tokens", "Of them, tokens that were cached.", stats.prefix_tokens_hit),
    ):
        yield CounterMetricFamily(f"loramux_{name}", text, value)


def _for_gateways(stats: EngineStats) -> Iterator[Metric]:
    """Yield the names that vLLM gave them, which inference gateways read."""
    used = stats.blocks_total - stats.blocks_free
    for name, text, value in (
        ("num_requests_waiting", "Sequences that wait for a place.", stats.waiting),
        ("num_requests_running", "Sequences that steps compute.", stats.running),
        ("kv_cache_usage_perc", "Part of the cache's blocks that is used, 0 to 1.", used / stats.blocks_total),
    ):
        yield GaugeMetricFamily(f"vllm:{name}", text, value)
    config = GaugeMetricFamily("vllm:cache_config_info", "1.", labels=["block_size", "num_gpu_blocks"])
    config.add_metric([str(stats.block_size), str(stats.blocks_total)], 1)
    yield config
