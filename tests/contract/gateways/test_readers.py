"""The state of replicas that gateways read, and the choices that they make by it.

KServe, main of October 2026: config/llmisvcconfig/*.yaml and pkg/controller/v1alpha2/llmisvc/.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
import pytest_asyncio

from tests.contract.gateways.controllers import PAYLOADS, STATS, Router
from tests.contract.gateways.picker import Endpoint, pick, read
from tests.support.openai_api import OpenAIApi
from tests.support.served_replicas import Built, open_fleet
from tests.support.waiting import BOUND_S, bounded, until

pytestmark = pytest.mark.asyncio(loop_scope="module")
HOMES = ("all", "rs", "wide")
"""The adapter that each of the replicas has in memory."""
ROOM = 29_000 / 1e9
"""GB that hold the largest of the adapters, which is `all`, or the two others."""
HEADER = "X-Gateway-Model-Name"
"""Header that a route of KServe's matches, and passes on."""
Fleet = dict[str, OpenAIApi]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def started(chatty: Built) -> AsyncIterator[Fleet]:
    """Three replicas with one seat, of which each keeps one adapter in memory, by the adapter's name."""
    async with open_fleet(chatty, len(HOMES), preload=0, adapter_memory_gb=ROOM, max_batch_seqs=1) as apis:
        replicas = dict(zip(HOMES, apis, strict=True))
        for name, api in replicas.items():
            assert (await api.post(f"/v1/adapters/{name}/pin")).status_code == 200
        yield replicas


@pytest_asyncio.fixture(loop_scope="module")
async def fleet(started: Fleet) -> Fleet:
    """The replicas, which are free and have their adapters."""
    for name, api in started.items():
        await api.until_free()
        async with bounded(f"{name} in memory"):
            while name not in (await look(api)).active:
                pass
    return started


@pytest.fixture
def api(fleet: Fleet) -> OpenAIApi:
    """The replica with room for two adapters beside the base."""
    return fleet["rs"]


@asynccontextmanager
async def busy(api: OpenAIApi, model: str) -> AsyncIterator[None]:
    """Have a replica compute one of four requests while others wait; it stands still until the block ends."""
    body = {"model": model, "prompt": [5] * 40, "max_tokens": 200, "ignore_eos": True}
    answers = [asyncio.create_task(api.post("/v1/completions", **body)) for _ in range(4)]
    await until(lambda: api.ready.engine.stats.waiting, "requests that wait")
    await api.ready.engine.pause()
    try:
        yield
    finally:
        api.ready.engine.resume()
        assert [each.status_code for each in await asyncio.gather(*answers)] == [200] * 4


async def look(api: OpenAIApi) -> Endpoint:
    """Scrape a replica as the picker does."""
    answer = await api.http.get("/metrics")
    assert answer.status_code == 200
    return read(answer.text)


async def look_at_all(fleet: Fleet) -> dict[str, Endpoint]:
    """Return the picker's view."""
    return {name: await look(api) for name, api in fleet.items()}


async def test_a_request_goes_where_its_adapter_is(fleet: Fleet) -> None:
    """The picker chooses a replica that has the adapter in memory, though nothing uses it there."""
    for name in HOMES:
        endpoints = await look_at_all(fleet)
        chosen = pick(name, endpoints)
        assert name in endpoints[chosen].active
        answer = await fleet[chosen].post("/v1/completions", model=name, prompt=[5], max_tokens=1)
        assert answer.headers["x-loramux-model"] == name
    assert pick("all", await look_at_all(fleet)) == "all"


async def test_the_base_goes_where_nobody_waits(fleet: Fleet) -> None:
    """The base's next request goes to the one of three replicas where none waits."""
    async with busy(fleet["rs"], "rs"), busy(fleet["wide"], "wide"):
        endpoints = await look_at_all(fleet)
        assert (endpoints["rs"].running, endpoints["all"].waiting) == (1, 0)
        assert endpoints["rs"].kv_usage > 0
        assert min(endpoints["rs"].waiting, endpoints["wide"].waiting) > 0
        assert pick("base", endpoints) == "all"


async def test_production_stacks_router_learns_what_is_served(api: OpenAIApi) -> None:
    """Models have roots and times, the base first with its adapters; all figures count, all models answer."""
    async with httpx.AsyncClient(timeout=BOUND_S) as web:
        router = Router(web)
        models = await router.discover(api.url)
        assert [(each["id"], each["parent"]) for each in models[:1]] == [("base", None)]
        assert {each["id"]: each["parent"] for each in models[1:]} == dict.fromkeys(HOMES, "base")
        assert all(each["root"] and each["created"] > 1_700_000_000 for each in models)
        before = await router.stats(api.url)
        for _ in range(2):
            requests = {"model": "rs", "prompt": list(range(3, 43)), "max_tokens": 1}
            assert (await api.post("/v1/completions", **requests)).status_code == 200
        stats = await router.stats(api.url)
        assert stats.keys() == STATS
        grown = {name: value - before[name] for name, value in stats.items() if value != before[name]}
        assert grown == {"vllm:gpu_prefix_cache_queries_total": 80, "vllm:gpu_prefix_cache_hits_total": 32}
        for path in PAYLOADS:
            for model in ("base", "wide"):
                assert await router.is_healthy(api.url, model, path)
            assert not await router.is_healthy(api.url, "nobody", path)


async def test_each_model_has_kserves_name_too(api: OpenAIApi) -> None:
    """Base and adapters answer the same under either name at every route; a wrong name is not the base's."""

    def ask(path: str, model: str) -> Awaitable[httpx.Response]:
        messages = [{"role": "user", "content": "hi"}]
        body: dict[str, Any] = {"model": model, "temperature": 0}
        body |= {"input": "hi", "max_output_tokens": 4} if "responses" in path else {"max_tokens": 4}
        body |= {"prompt": "hi"} if path == "/v1/completions" else {"messages": messages}
        body = {key: value for key, value in body.items() if "responses" not in path or key != "messages"}
        return api.http.post(path, json=body, headers={HEADER: model})

    for path, stated in (
        ("/v1/completions", "choices"),
        ("/v1/chat/completions", "choices"),
        ("/v1/responses", "output"),
        ("/v1/messages", "content"),
    ):
        for name in ("base", "rs"):
            short, long = [await ask(path, model) for model in (name, f"publishers/ns/models/{name}")]
            assert _texts(short.json()[stated]) == _texts(long.json()[stated]) != []
            assert long.headers["x-loramux-model"] == name
    for nobody in ("publishers/ns/models/nobody", "publishers/ns/rs", "publishers/n/s/models/rs"):
        assert (await ask("/v1/completions", nobody)).json()["error"]["code"] == "model_not_found"
    assert (await ask("/v1/completions", "publishers/ns/models/")).json()["error"]["code"] == "model_not_found"


def _texts(items: list[dict[str, Any]]) -> list[str]:
    """The texts in the content of an answer."""
    found = [item["message"]["content"] if "message" in item else item.get("text") for item in items]
    return [text or _texts(item["content"])[0] for text, item in zip(found, items, strict=True)]
