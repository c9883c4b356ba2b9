"""The engine's content at the moment of a scrape, and the metrics that inference gateways read."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import version
from typing import TYPE_CHECKING, Final, TypeVar

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from inference_service.adapters.catalog import Catalog
from inference_service.adapters.views import Facts
from inference_service.driver.engine_thread import EngineThread

if TYPE_CHECKING:  # which would import torch
    from inference_service.engine.engine import EngineStats

MODEL_LABEL: Final = "model_name"
"""Label of vLLM's families that are of a whole replica: the served base, by which gateways tell
replicas apart.
"""
Family = TypeVar("Family", GaugeMetricFamily, CounterMetricFamily)


def of_model(family: Family, model: str, value: float) -> Family:
    """Give a family its only sample."""
    family.add_metric([model], value)
    return family


class ReplicaCollector(Collector):
    """A collector that reads the engine at every scrape."""

    def __init__(self, catalog: Catalog, engine: EngineThread, facts: Facts) -> None:
        self._catalog = catalog
        self._engine = engine
        self._facts = facts
        self._version = version("loramux")

    def collect(self) -> Iterator[Metric]:
        """Yield every family."""
        stats = self._engine.stats
        yield from _memory(stats)
        yield GaugeMetricFamily("loramux_load_seconds", "Time that the start took.", self._facts.load_s)
        build = GaugeMetricFamily("loramux_build_info", "1.", labels=["version", "generation"])
        build.add_metric([self._version, str(self._catalog.generation)], 1)
        yield build
        computing = self._facts.computing
        operations = GaugeMetricFamily(
            "loramux_operations_info",
            "1; lack: why torch's operations replace compiled ones.",
            labels=["backend", "operations", "product", "lack"],
        )
        labels = [computing.backend, computing.how, computing.product, computing.lack or ""]
        operations.add_metric(labels, 1)
        yield operations
        if computing.token_s is not None:
            text = "Least time of a token, by the memory speed measured at the start."
            yield GaugeMetricFamily("loramux_least_token_seconds", text, computing.token_s)
        yield from _for_gateways(stats, self._catalog.base_name)


def _memory(stats: EngineStats) -> Iterator[Metric]:
    used = stats.blocks_total - stats.blocks_free
    for name, text, value in (
        ("kv_cache_blocks", "Blocks of the key-value cache.", stats.blocks_total),
        ("kv_cache_blocks_used", "Blocks that sequences hold.", used),
    ):
        yield GaugeMetricFamily(f"loramux_{name}", text, value)
    for name, text, value in (
        ("preemptions", "Preempted sequences, which are computed again.", stats.preemptions),
        ("prefix_cache_queried_tokens", "Tokens looked up in the prefix cache.", stats.prefix_tokens_queried),
        ("prefix_cache_hit_tokens", "Tokens found in the prefix cache.", stats.prefix_tokens_hit),
        ("drafted_tokens", "Tokens that were drafted and verified.", stats.tokens_drafted),
        ("accepted_tokens", "Drafted tokens that were accepted.", stats.tokens_accepted),
    ):
        yield CounterMetricFamily(f"loramux_{name}", text, value)


def _for_gateways(stats: EngineStats, base: str) -> Iterator[Metric]:
    """Yield the names that vLLM gave them, which inference gateways read, some those of earlier versions."""
    usage = (stats.blocks_total - stats.blocks_free) / stats.blocks_total
    for name, text, value in (
        ("num_requests_waiting", "Waiting sequences.", stats.waiting),
        ("num_requests_running", "Running sequences.", stats.running),
        ("kv_cache_usage_perc", "Fraction of the key-value cache in use, 0 to 1.", usage),
        ("gpu_cache_usage_perc", "Fraction of the key-value cache in use, by its older name.", usage),
    ):
        yield of_model(GaugeMetricFamily(f"vllm:{name}", text, labels=[MODEL_LABEL]), base, value)
    for name, text, value in (
        ("gpu_prefix_cache_queries", "Tokens looked up in the prefix cache.", stats.prefix_tokens_queried),
        ("gpu_prefix_cache_hits", "Tokens found in the prefix cache.", stats.prefix_tokens_hit),
    ):
        yield of_model(CounterMetricFamily(f"vllm:{name}", text, labels=[MODEL_LABEL]), base, value)
    config = GaugeMetricFamily("vllm:cache_config_info", "1.", labels=["block_size", "num_gpu_blocks"])
    config.add_metric([str(stats.block_size), str(stats.blocks_total)], 1)
    yield config
