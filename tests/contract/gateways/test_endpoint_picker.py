"""The endpoint picker of llm-d and the inference gateway: what it scrapes, and where it sends requests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest_asyncio

from tests.contract.gateways.picker import Endpoint, pick, read
from tests.support.openai_door import OpenAIDoor
from tests.support.served_replicas import Built, open_fleet

HOMES = ("all", "rs", "wide")
"""The adapter that each of the replicas has."""
LONG: dict[str, Any] = {"prompt": [5, 6, 7], "max_tokens": 200, "ignore_eos": True}
ROOM = 29_000 / 1e9
"""GB that hold the largest of the adapters, which is `all`, or the two others."""
Fleet = dict[str, OpenAIDoor]


@pytest_asyncio.fixture
async def fleet(chatty: Built) -> AsyncIterator[Fleet]:
    """Three replicas, of which each keeps one adapter in memory, by the adapter's name."""
    async with open_fleet(chatty, len(HOMES), preload=0, adapter_memory_gb=ROOM, max_batch_seqs=1) as doors:
        replicas = dict(zip(HOMES, doors, strict=True))
        for name, door in replicas.items():
            assert (await door.post(f"/v1/adapters/{name}/pin")).status_code == 200
            for _ in range(500):
                if name in (await look(door)).active:
                    break
                await asyncio.sleep(0.01)
        yield replicas


async def look(door: OpenAIDoor) -> Endpoint:
    """Scrape a replica as the picker does, every 50 ms there."""
    answer = await door.http.get("/metrics")
    assert answer.status_code == 200
    return read(answer.text)


async def look_at_all(fleet: Fleet) -> dict[str, Endpoint]:
    """What the picker knows."""
    return {name: await look(door) for name, door in fleet.items()}


async def test_everything_that_is_scraped_is_there(fleet: Fleet) -> None:
    """No family is missing, labels are decimal strings, and both ways to tell of adapters say the same."""
    for name, each in (await look_at_all(fleet)).items():
        assert (each.base, each.block_size, each.kv_usage, each.waiting) == ("base", 16, 0, 0)
        assert each.blocks > 0
        assert each.active == {adapter for adapter, (level, _) in each.loaded.items() if level == "gpu"}
        assert each.loaded[name] == ("gpu", True)
        assert len(each.active) == each.gpu_loaded <= each.slots
        assert each.load_s > 0


async def test_a_request_goes_where_its_adapter_is(fleet: Fleet) -> None:
    """For each adapter the picker chooses a replica that has it in memory, though nobody asks for it there."""
    for name in HOMES:
        endpoints = await look_at_all(fleet)
        chosen = pick(name, endpoints)
        assert name in endpoints[chosen].active
        assert any(name not in each.active for each in endpoints.values())
        answer = await fleet[chosen].post("/v1/completions", model=name, prompt=[5], max_tokens=1)
        assert answer.headers["x-loramux-model"] == name
    assert pick("all", await look_at_all(fleet)) == "all"


async def test_the_base_goes_where_nobody_waits(fleet: Fleet) -> None:
    """With requests that wait at two of three replicas, the base's next one goes to the third."""
    busy = [
        asyncio.create_task(fleet[name].post("/v1/completions", model=name, **LONG))
        for name in ("rs", "wide")
        for _ in range(4)
    ]
    for _ in range(200):
        endpoints = await look_at_all(fleet)
        if endpoints["rs"].waiting == endpoints["wide"].waiting == 3:
            break
    assert endpoints["rs"].running == 1
    assert endpoints["rs"].kv_usage > 0
    assert pick("base", endpoints) == "all"
    assert all(answer.status_code == 200 for answer in await asyncio.gather(*busy))


async def test_a_replica_that_drains_is_seen(fleet: Fleet) -> None:
    """Its scrape fails, so that the picker's view of it grows old, and its probe does."""
    await fleet["rs"].server.refuse()
    for path in ("/metrics", "/health"):
        assert (await fleet["rs"].http.get(path)).status_code == 503
