"""Metrics of thousands of adapters: series of used or resident adapters, and counters that never lie."""

from types import SimpleNamespace
from typing import cast

import pytest

from inference_service.core.request import Request
from inference_service.core.served_model import ServedModel
from inference_service.driver.engine_thread import EngineThread
from inference_service.driver.telemetry import model_series
from inference_service.driver.telemetry.metrics import Metrics
from inference_service.driver.telemetry.record import following
from inference_service.engine.engine import EngineStats, SequenceCounts
from tests.support.metrics import Scrape
from tests.support.services.managed_replica import ManagedReplica, managed_replica

STATS = EngineStats(0, 0, 6, 8, 16, 4, 0, 10, 5, 0)
COUNTED = model_series.Counted("loramux_asked", "Asked.", "outcome")
TOOK = model_series.Timed("loramux_took_seconds", "Took.", (0.1, 1.0))


def metrics_of(
    replica: ManagedReplica, counts: SequenceCounts | None = None, most: int = model_series.MOST
) -> Metrics:
    counts = counts or SequenceCounts({}, {})
    engine = cast(EngineThread, SimpleNamespace(stats=STATS, sequence_counts=counts))
    return Metrics(replica.names, engine, replica.manager, most)


def use(metrics: Metrics, model: ServedModel) -> None:
    """A request for a model that ends at once."""
    with following(Request.of(model.name, "x"), [metrics]) as follower:
        follower.record.model = model


def observe(metrics: Metrics, model: ServedModel) -> None:
    """A request for a model that is answered: a value of every histogram."""
    use(metrics, model)
    names = ("request", "queue", "time_to_first_token", "time_per_output_token")
    metrics.add((), [(f"loramux_{name}_seconds", model.name, 1.0) for name in names], {})


def scrape(series: model_series.ModelSeries) -> Scrape:
    return Scrape(b"".join(series.parts()).decode())


def test_a_scrape_has_a_bound_whatever_is_in_memory() -> None:
    """A scrape of 1,000 used models has the counters of as many as are set, and the sum of the others."""
    replica = managed_replica([f"customer-support-{number:05}" for number in range(1000)])
    metrics = metrics_of(replica, most=20)
    for number, model in enumerate(replica.names.everything[1:]):
        assert model.adapter is not None
        replica.residency.hold(model.adapter, used_s=float(number))
        observe(metrics, model)
    data = metrics.render()
    assert len(data) < 21 * 6000 + 40_000  # 6 KB for a model, and a thousand names for gateways
    scraped = Scrape(data.decode())
    assert len(scraped.series("vllm:lora_adapter_loaded")) == 19  # and the base
    assert scraped.series("vllm:lora_adapter_loaded")[-1][0]["adapter_name"] == "customer-support-00999"
    counts = {labels["model"]: value for labels, value in scraped.series("loramux_request_seconds_count")}
    assert counts == {f"customer-support-{number:05}": 1 for number in range(20)} | {model_series.OTHERS: 980}
    assert scraped.value("vllm:num_gpu_loaded_lora_adapters") == 1000


def test_a_place_that_becomes_free_is_given_away() -> None:
    """A model that finds no room counts for the others until one was not used for an hour."""
    now = [0.0]
    series = model_series.ModelSeries([COUNTED], [TOOK], 2, clock=lambda: now[0])
    for model in ("a", "b", "c", "d", "c"):
        series.count(COUNTED.name, model, label="OK")
        series.observe(TOOK.name, model, 0.5)
    for name in ("loramux_asked_total", "loramux_took_seconds_count"):
        found = {labels["model"]: value for labels, value in scrape(series).series(name)}
        assert found == {"a": 1, "b": 1, model_series.OTHERS: 3}
    now[0] = model_series.LATELY_S
    series.count(COUNTED.name, "b", label="OK")
    series.count(COUNTED.name, "c", label="OK")
    now[0] += 1
    series.count(COUNTED.name, "c", label="OK")
    found = {labels["model"]: value for labels, value in scrape(series).series("loramux_asked_total")}
    assert found == {"b": 2, model_series.OTHERS: 4, "c": 1}


@pytest.mark.parametrize("name", ['a"b', "a\\b", "a\nb", "ä"])
def test_every_name_can_be_read_again(name: str) -> None:
    """Quotes, backslashes and line ends in a name are escaped in its label."""
    series = model_series.ModelSeries([COUNTED], [])
    series.count(COUNTED.name, name, label=name)
    assert scrape(series).series("loramux_asked_total") == [({"model": name, "outcome": name}, 1)]
    assert "\n" not in model_series.label(name)
