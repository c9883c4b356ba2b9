"""/metrics of a running server, as Prometheus and inference gateways read it."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from inference_service.core.sequence import Batch
from inference_service.engine.execution.runner import Pending
from loramux_shared.faults import Fault
from loramux_shared.storage.memory import MemoryStore
from tests.golden.metrics.script import NAMES, names
from tests.support.grpc_api import open_client
from tests.support.metrics import Scrape
from tests.support.openai_api import OpenAIApi, open_api
from tests.support.steps import Submit, engine_around
from tests.support.tiny import World
from tests.support.waiting import BOUND_S, bounded

PROMPT = [3 + (7 * place) % 190 for place in range(40)]
FIELDS: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 6, "ignore_eos": True}


@pytest_asyncio.fixture
async def api(chatty: tuple[World, MemoryStore]) -> AsyncIterator[OpenAIApi]:
    async with open_api(chatty, max_batch_seqs=2, max_queue=8) as api:
        yield api


async def scrape(api: OpenAIApi) -> Scrape:
    response = await api.http.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    return Scrape(response.text)


def test_names_are_the_kept_ones() -> None:
    """Dashboards, alerts and gateways go by these names and labels: `make golden` rewrites them."""
    assert names() == NAMES.read_text()


async def test_requests_are_counted_by_model(api: OpenAIApi) -> None:
    """Metrics count requests, answers of n, and prompt, cached and generated tokens by model."""
    for body in (FIELDS | {"model": "rs"}, FIELDS | {"model": "rs", "n": 3}, FIELDS | {"model": "base"}):
        assert (await api.post("/v1/completions", **body)).status_code == 200
    metrics = await scrape(api)
    for model, requests, answers in (("rs", 2, 4), ("base", 1, 1), ("wide", 0, 0)):
        expected = {
            "requests_total": requests,
            "answers_total": answers,
            "prompt_tokens_total": requests * 40,
            "generated_tokens_total": answers * 6,
            "queue_seconds_count": requests,
            "time_to_first_token_seconds_count": requests,
            "request_seconds_count": requests,
            "time_per_output_token_seconds_count": answers,
        }
        assert {name: metrics.value(f"loramux_{name}", model=model) for name in expected} == expected, model
    assert metrics.series("loramux_answers_total")[0][0] == {"model": "rs", "finish": "length"}
    assert (
        metrics.value("loramux_cached_prompt_tokens_total", model="rs") == 32
    )  # the second request's two blocks
    for gateways, ours in (("hits", "hit"), ("queries", "queried")):
        found = metrics.value(f"vllm:gpu_prefix_cache_{gateways}_total")
        assert found == metrics.value(f"loramux_prefix_cache_{ours}_tokens_total") > 0
    assert metrics.value("loramux_requests_total", outcome="OK", model="rs") == 2


async def test_every_end_has_an_outcome(api: OpenAIApi) -> None:
    """A request that failed or went away is counted under its reason, and no invented name is a label."""
    async with open_client(api.ready) as client:
        for model, fields in (("rs", {"temperature": -1.0}), ("made-up", {}), ("rs", {"max_tokens": 999})):
            with pytest.raises(Fault):
                await client.complete(model, "x", **fields)
        stream = client.generate("wide", "x", max_tokens=200, ignore_eos=True)
        await anext(stream)
        await anext(stream)
        await stream.aclose()
        await api.until_free()
    metrics = await scrape(api)
    outcomes = {(own["model"], own["outcome"]): seen for own, seen in metrics.series("loramux_requests_total")}
    assert outcomes == {
        ("rs", "REQUEST_INVALID"): 1,
        ("", "MODEL_NOT_FOUND"): 1,
        ("rs", "PROMPT_TOO_LONG"): 1,
        ("wide", "CANCELLED"): 1,
    }
    assert "made-up" not in metrics.text


async def test_gateways_see_who_runs_and_who_waits(chatty: tuple[World, MemoryStore]) -> None:
    """Two adapters run and two wait with two seats and four long requests; afterwards none does."""
    steps, before = threading.Semaphore(1000), time.time()  # for those of the start

    def step_waits(submit: Submit, batch: Batch) -> Pending:
        assert steps.acquire(timeout=BOUND_S)
        return submit(batch)

    async with open_api(chatty, build=engine_around(step_waits), max_batch_seqs=2, max_queue=8) as api:
        while steps.acquire(blocking=False):
            pass
        await _see_who_runs_and_who_waits(api, steps, before)


async def _see_who_runs_and_who_waits(api: OpenAIApi, steps: threading.Semaphore, before: float) -> None:
    long = FIELDS | {"max_tokens": 60}
    tasks = [
        asyncio.create_task(api.post("/v1/completions", **long | {"model": model}))
        for model in ("all", "base", "rs", "wide")
    ]
    async with bounded("two requests that wait", lambda: busy.text):
        while (busy := await scrape(api)).value("vllm:num_requests_waiting") < 2:
            steps.release()
    assert busy.value("vllm:num_requests_running") == 2
    assert 0 < busy.value("vllm:kv_cache_usage_perc") < 1
    [(labels, when)] = busy.series("vllm:lora_requests_info")
    assert before <= when <= time.time()
    running, waiting = (labels[f"{state}_lora_adapters"] for state in ("running", "waiting"))
    assert labels["max_lora"] == "64"
    assert running == "all,rs,wide"
    assert 1 <= len(waiting.split(",")) <= 2
    assert set(waiting.split(",")) < {"all", "rs", "wide"}
    assert sum(value for _, value in busy.series("loramux_sequences_running")) == 2
    assert sum(value for _, value in busy.series("loramux_sequences_waiting")) == 2
    steps.release(1000)
    await asyncio.gather(*tasks)
    await api.until_free()
    idle = await scrape(api)
    [(labels, _)] = idle.series("vllm:lora_requests_info")
    assert labels == {"max_lora": "64", "running_lora_adapters": "all,rs,wide", "waiting_lora_adapters": ""}
    assert idle.value("vllm:kv_cache_usage_perc") == idle.value("vllm:num_requests_running") == 0
    stats = api.ready.engine.stats
    config = {"block_size": str(stats.block_size), "num_gpu_blocks": str(stats.blocks_total)}
    assert idle.series("vllm:cache_config_info") == [(config, 1)]


async def test_what_is_loaded_is_reported(api: OpenAIApi) -> None:
    """Adapters, their digests, how long each took to load, and the generation."""
    metrics = await scrape(api)
    assert metrics.value("loramux_adapters_resident") == 3
    assert metrics.value("vllm:num_gpu_loaded_lora_adapters") == 3
    loaded = [own for own, value in metrics.series("vllm:lora_adapter_loaded") if value]
    assert {"adapter_name": "wide", "level": "gpu", "pinned": "false"}.items() <= loaded[-1].items()
    digest = api.ready.service.local.catalog.get("wide").digest[:12]
    assert metrics.value("loramux_model_info", model="wide", digest=digest) == 1
    assert metrics.value("loramux_build_info", generation="1") == 1
    computing = api.ready.service.local.adapters.facts.computing
    of_operations = {"backend": computing.backend, "operations": computing.how, "product": computing.product}
    assert metrics.series("loramux_operations_info") == [(of_operations | {"lack": ""}, 1)]
    assert metrics.value("loramux_least_token_seconds") == (computing.token_s or 0.0)
    loads = {own["model"]: value for own, value in metrics.series("loramux_model_load_seconds")}
    assert set(loads) == {"base", "all", "rs", "wide"}
    assert 0 < sum(loads.values()) < metrics.value("loramux_load_seconds")
