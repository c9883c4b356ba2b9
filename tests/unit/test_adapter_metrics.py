"""Metrics of thousands of adapters: series of what is used or in memory, and counters that never lie."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest

from inference_service.engine.engine import EngineStats, SequenceCounts
from inference_service.engine.residency_entry import LOAD_BUCKETS_S, ResidencyStats
from inference_service.serving.catalog import ServedModel
from inference_service.serving.request import Request
from inference_service.serving.telemetry.adapters import MOST as MOST_ADAPTERS
from inference_service.serving.telemetry.metrics import Metrics
from inference_service.serving.telemetry.model_series import LATELY_S, Counted, ModelSeries, Timed
from inference_service.serving.telemetry.model_series import MOST as MOST_MODELS
from inference_service.serving.telemetry.record import following
from inference_service.serving.telemetry.replica import EngineView
from inference_service.serving.telemetry.text_format import label
from tests.support.metrics import Scrape
from tests.support.operated import Operated, operated

STATS = EngineStats(0, 0, 6, 8, 16, 4, 0, 10, 5, 0)
ASKED = Counted("loramux_asked", "Asked.", "outcome")
TOOK = Timed("loramux_took_seconds", "Took.", (0.1, 1.0))


def metrics_of(replica: Operated, counts: SequenceCounts | None = None) -> Metrics:
    """Metrics that ask a replica."""
    counts = counts or SequenceCounts({}, {})
    engine = cast(EngineView, SimpleNamespace(stats=STATS, sequence_counts=counts))
    metrics = Metrics(replica.names, engine)
    metrics.show(replica.manager)
    return metrics


def use(metrics: Metrics, model: ServedModel) -> None:
    """A request for a model that ends at once."""
    with following(Request(model.name, "x"), [metrics]) as follower:
        follower.record.model = model


def test_what_is_only_registered_has_no_series() -> None:
    """Of 10,000 names a scrape tells their number, and of those in memory everything."""
    replica = operated([f"lora-{number:05}" for number in range(10_000)])
    metrics = metrics_of(replica)
    lines = metrics.render().count(b"\n")
    for number in range(3):
        replica.residency.hold(replica.adapter(f"lora-{number:05}"), used_s=float(number))
    replica.manager.pin("lora-00001")
    said = Scrape(metrics.render().decode())
    assert said.value("loramux_adapters_registered") == 10_000
    assert said.value("vllm:num_gpu_loaded_lora_adapters") == 3
    expected = {"adapter_name": "lora-00001", "level": "gpu", "pinned": "true"}
    assert said.series("vllm:lora_adapter_loaded")[1] == (expected, 1)
    [(labels, _)] = said.series("vllm:lora_requests_info")
    assert labels["running_lora_adapters"] == "lora-00000,lora-00001,lora-00002"
    assert said.text.count("\n") == lines + 3 * 5


def test_a_scrape_has_a_bound_whatever_is_in_memory() -> None:
    """With all of 10,000 resident and used, it is below 1 MB, and tells of those that were used last."""
    replica = operated([f"customer-support-{number:05}" for number in range(10_000)])
    metrics = metrics_of(replica)
    for number, model in enumerate(replica.names.everything[1:]):
        assert model.adapter is not None
        replica.residency.hold(model.adapter, used_s=float(number))
        use(metrics, model)
        metrics._models.observe("loramux_request_seconds", model.name, 1.0)
        metrics._models.observe("loramux_queue_seconds", model.name, 1.0)
        metrics._models.observe("loramux_time_to_first_token_seconds", model.name, 1.0)
        metrics._models.observe("loramux_time_per_output_token_seconds", model.name, 1.0)
    data = metrics.render()
    assert len(data) < 1_000_000
    said = Scrape(data.decode())
    assert len(said.series("vllm:lora_adapter_loaded")) == MOST_ADAPTERS
    assert len(said.series("loramux_request_seconds_count")) == MOST_MODELS
    assert said.series("loramux_requests_total")[-1][0]["model"] == "customer-support-09999"
    assert said.value("vllm:num_gpu_loaded_lora_adapters") == 10_000


def test_counters_of_a_model_only_grow_or_begin_anew() -> None:
    """A model that was not used for an hour has no series; one that comes back begins at its first request."""
    now = [0.0]
    series = ModelSeries([ASKED], [TOOK], clock=lambda: now[0])
    for _ in range(3):
        series.count(ASKED.name, "a", said="OK")
    series.observe(TOOK.name, "a", 0.5)
    now[0] = LATELY_S - 1
    series.count(ASKED.name, "b", said="OK")
    assert Scrape(series.render()).value("loramux_asked_total", model="a", outcome="OK") == 3
    now[0] = LATELY_S + 1
    said = Scrape(series.render())
    assert [labels["model"] for labels, _ in said.series("loramux_asked_total")] == ["b"]
    series.count(ASKED.name, "a", said="OK")
    assert Scrape(series.render()).value("loramux_asked_total", model="a", outcome="OK") == 1


def test_a_histogram_adds_up() -> None:
    """Each bucket holds what is below it; sum and count are those of all."""
    series = ModelSeries([ASKED], [TOOK])
    for seconds in (0.05, 0.1, 0.5, 3.0):
        series.observe(TOOK.name, "a", seconds)
    said = Scrape(series.render())
    buckets = [(labels["le"], value) for labels, value in said.series("loramux_took_seconds_bucket")]
    assert buckets == [("0.1", 2), ("1.0", 3), ("+Inf", 4)]
    assert said.value("loramux_took_seconds_sum", model="a") == pytest.approx(3.65)
    assert said.value("loramux_took_seconds_count", model="a") == 4


@pytest.mark.parametrize("name", ['a"b', "a\\b", "a\nb", "ä"])
def test_every_name_can_be_read_again(name: str) -> None:
    """What is special in the format is escaped."""
    series = ModelSeries([ASKED], [])
    series.count(ASKED.name, name, said=name)
    assert Scrape(series.render()).series("loramux_asked_total") == [({"model": name, "outcome": name}, 1)]
    assert "\n" not in label(name)


def test_loads_are_told_by_their_time() -> None:
    """As a histogram; a load longer than the last bound counts too."""
    stats = ResidencyStats()
    for seconds in (LOAD_BUCKETS_S[0], 0.3, 1e4):
        stats.loaded(seconds)
    replica = operated()
    replica.residency.stats = stats
    said = Scrape(metrics_of(replica).render().decode())
    assert said.value("vllm:lora_adapter_load_seconds_bucket", le=str(LOAD_BUCKETS_S[0])) == 1
    assert said.value("vllm:lora_adapter_load_seconds_bucket", le="0.5") == 2
    assert said.value("vllm:lora_adapter_load_seconds_bucket", le="+Inf") == 3
    assert said.value("vllm:lora_adapter_load_seconds_sum") == pytest.approx(1e4 + 0.3 + LOAD_BUCKETS_S[0])
    assert said.value("loramux_adapter_loads_total") == 3
