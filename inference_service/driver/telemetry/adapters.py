"""Metrics of adapters: sums from the library, and series of each adapter that is in the bank or at work."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import TYPE_CHECKING, Final, NamedTuple

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from inference_service.adapters.catalog import Catalog
from inference_service.adapters.manager import AdapterManager
from inference_service.adapters.views import TIERS
from inference_service.core.served_model import ServedModel
from inference_service.driver.engine_thread import EngineThread
from inference_service.driver.telemetry.model_series import MOST, Lines, bounds_of, families, head, sample
from inference_service.driver.telemetry.replica import MODEL_LABEL, of_model
from inference_service.engine.scheduling.residents import LOAD_BUCKETS_S, AdapterState
from loramux_shared.deployment import ModelLimits
from loramux_shared.operations import ReplicaStatus, Tier

if TYPE_CHECKING:  # which would import torch
    from inference_service.engine.engine import SequenceCounts

MOST_NAMED: Final = 2000
"""Names in one label."""
LEVELS: Final = {"device": "gpu", "host": "cpu"}
"""vLLM's words; on a machine without a GPU the bank is the host's, and what is in it is ready all the same."""
INFO: Final = "vllm:lora_requests_info"
HEADS: Final = tuple(
    head(name, "gauge", text)
    for name, text in (
        ("loramux_sequences_running", "Running sequences."),
        ("loramux_sequences_waiting", "Waiting sequences."),
        ("loramux_model_load_seconds", "Time to read, check and pack a model."),
        ("loramux_model_info", "1; the digest is empty for the base."),
        ("loramux_model_limit", "Limit of a model."),
        ("vllm:lora_adapter_loaded", "1; level: gpu for a resident adapter, cpu while it is loaded."),
    )
)
"""Heads of the families that have a series for each model; the last name is vLLM's."""
INFO_HEAD: Final = head(
    INFO, "gauge", "Unix time; adapters that are resident, and those that sequences wait for."
)


class _Listed(NamedTuple):
    model: ServedModel
    place: Tier
    used_s: float


class _Facts(NamedTuple):
    """The values in the lines of a model."""

    model: ServedModel
    running: int
    waiting: int
    level: str | None
    """None for the base, and for what is not in memory."""
    pinned: bool
    limits: ModelLimits

    def lines(self) -> Lines:
        model, named = self.model, {"model": self.model.name}
        limits = self.limits.of(model.name).model_dump()
        loaded = {"adapter_name": model.name, "level": self.level or "", "pinned": str(self.pinned).lower()}
        return (
            sample("loramux_sequences_running", named, self.running),
            sample("loramux_sequences_waiting", named, self.waiting),
            sample("loramux_model_load_seconds", named, model.load_s),
            sample("loramux_model_info", named | {"digest": model.digest[:12]}, 1),
            b"".join(
                sample("loramux_model_limit", named | {"limit": limit}, value)
                for limit, value in limits.items()
            ),
            sample("vllm:lora_adapter_loaded", loaded, 1) if self.level else b"",
        )


class AdapterSeries(Collector):
    """The sums over all adapters, and series of the models that are in memory or at work.

    There are none of those that are only registered. A model's lines are written when something that they say
    is not what it was at the last scrape.
    """

    def __init__(
        self, catalog: Catalog, engine: EngineThread, adapters: AdapterManager, most: int = MOST
    ) -> None:
        """Begin; the most models that were used last have series of their own."""
        self._most = most
        self._catalog = catalog
        self._engine = engine
        self._adapters = adapters
        self._written: Mapping[str, tuple[_Facts, Lines]] = {}

    def collect(self) -> Iterator[Metric]:
        """Yield the sums over all adapters."""
        view, stats = self._adapters.replica(), self._adapters.residency.stats
        for name, text, value in (
            ("loramux_adapters_registered", "Registered adapters.", view.registered),
            ("loramux_adapters_resident", "Resident versions.", view.resident),
            ("loramux_adapters_arriving", "Versions that are being loaded.", view.arriving),
            ("loramux_adapters_pinned", "Pinned adapters.", view.pinned),
            ("loramux_bank_bytes", "Memory for adapters.", view.bank_bytes),
            ("loramux_bank_used_bytes", "Memory that resident adapters use.", view.bank_bytes_used),
            ("loramux_generation", "Generation that is served.", view.generation),
            ("loramux_newest_generation", "Newest generation that the replica saw.", view.newest_generation),
            ("loramux_paused", "1 while an operator pauses the replica.", view.paused),
        ):
            yield GaugeMetricFamily(name, text, value)
        for name, text, value in (
            ("num_gpu_loaded_lora_adapters", "Resident versions.", view.resident),
            ("num_cpu_loaded_lora_adapters", "Versions that are being loaded.", view.arriving),
            ("max_gpu_lora_adapters", "Versions of the present mean size that fit.", self._room(view)),
        ):
            family = GaugeMetricFamily(f"vllm:{name}", text, labels=[MODEL_LABEL])
            yield of_model(family, self._catalog.base_name, value)
        for name, text, value in (
            ("loads", "Loaded versions.", stats.loads),
            ("load_failures", "Loads that failed.", stats.failures),
            ("evictions", "Evicted versions.", stats.evictions),
            ("load_waits", "Sequences that waited for a load of their adapter.", stats.waits),
        ):
            yield CounterMetricFamily(f"loramux_adapter_{name}", text, value)
        state = GaugeMetricFamily(
            "loramux_replica_state", "1; state: how current the replica is.", labels=["state"]
        )
        state.add_metric([view.state], 1)
        yield state
        yield _load_seconds(stats.load_counts, stats.load_seconds)

    def _room(self, view: ReplicaStatus) -> int:
        """Return how many as large as those in it the bank holds; of an empty one, as many as a step takes."""
        if not view.bank_bytes_used:
            return self._engine.stats.max_adapters
        return max(view.resident, view.resident * view.bank_bytes // view.bank_bytes_used)

    def parts(self) -> Iterator[bytes]:
        """Return everything, as Prometheus reads it."""
        listed, sequences = self._listed(), self._engine.sequence_counts
        lines = self._lines(listed[: self._most], sequences)
        return chain(families(HEADS, lines), (INFO_HEAD, self._info(listed, sequences)))

    def _listed(self) -> list[_Listed]:
        """Return the resident and active adapters, last used first; a scrape looks at each name once."""
        standings = {each.adapter: each for each in self._adapters.residency.standings()}
        found = []
        for model in self._catalog.everything:
            if model.adapter is None:
                found.append(_Listed(model, "device", math.inf))
            elif (standing := standings.get(model.adapter)) is not None:
                at_work = standing.in_flight or standing.waiting
                if standing.state is not AdapterState.ABSENT or at_work:
                    found.append(_Listed(model, TIERS[standing.state], standing.last_used_s or 0.0))
        return sorted(found, key=lambda each: -each.used_s)

    def _lines(self, listed: list[_Listed], sequences: SequenceCounts) -> list[Lines]:
        before, limits, written = self._written, self._catalog.deployed.limits, {}
        for each in sorted(listed, key=lambda each: each.model.name):
            name = each.model.name
            facts = _Facts(
                each.model,
                sequences.running.get(name, 0),
                sequences.waiting.get(name, 0),
                LEVELS.get(each.place) if name != self._catalog.base_name else None,
                self._adapters.is_pinned(name),
                limits,
            )
            previous = before.get(name)
            written[name] = (
                previous if previous is not None and previous[0] == facts else (facts, facts.lines())
            )
        self._written = written
        return [lines for _, lines in written.values()]

    def _info(self, listed: list[_Listed], sequences: SequenceCounts) -> bytes:
        """Return the adapters that are ready, and those that are waited for; of the base there is nothing."""
        places = {each.model.name: each.place for each in listed if each.model.name != self._catalog.base_name}
        ready = sorted(name for name, place in places.items() if place == "device")
        waiting = sorted(places.keys() & sequences.waiting.keys())
        labels = {
            "max_lora": str(self._engine.stats.max_adapters),
            "running_lora_adapters": ",".join(ready[:MOST_NAMED]),
            "waiting_lora_adapters": ",".join(waiting[:MOST_NAMED]),
        }
        return sample(INFO, labels, time.time())


def _load_seconds(counts: list[int], total: float) -> Metric:
    added, buckets = 0, []
    for bound, count in zip(bounds_of(LOAD_BUCKETS_S), counts, strict=True):
        added += count
        buckets.append((bound, float(added)))
    family = HistogramMetricFamily("vllm:lora_adapter_load_seconds", "Time of a load.", labels=["transition"])
    family.add_metric(["load"], buckets, total)
    return family
