"""vLLM's production-stack: its router's discovery and statistics, and its adapter controller."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
import pytest_asyncio

from tests.contract.gateways.production_stack import PAYLOADS, STATS, LoraController, LoraRefused, Router
from tests.support.openai_door import OpenAIDoor
from tests.support.served_replicas import Built, copied, open_builder, open_fleet, open_replica


@pytest_asyncio.fixture
async def web() -> AsyncIterator[httpx.AsyncClient]:
    """A client without an address of its own."""
    async with httpx.AsyncClient() as web:
        yield web


@pytest_asyncio.fixture
async def door(chatty: Built) -> AsyncIterator[OpenAIDoor]:
    """A replica that nobody changes."""
    async with open_replica(chatty) as door:
        yield door


async def test_the_router_learns_who_is_there(door: OpenAIDoor, web: httpx.AsyncClient) -> None:
    """The base first, without a parent; its adapters with it, each with a root and a time."""
    models = await Router(web, api_key="any").discover(door.url)
    base, *adapters = models.values()
    assert (base.id, base.parent) == ("base", None)
    assert {each.id: each.parent for each in adapters} == dict.fromkeys(("all", "rs", "wide"), "base")
    assert all(each.root and each.created > 1_700_000_000 for each in models.values())


async def test_the_router_reads_every_figure(door: OpenAIDoor, web: httpx.AsyncClient) -> None:
    """All of the names that it knows are there, once, and count."""
    asked = {"model": "rs", "prompt": list(range(3, 43)), "max_tokens": 1}
    before = await Router(web).stats(door.url)
    for _ in range(2):
        assert (await door.post("/v1/completions", **asked)).status_code == 200
    stats = await Router(web).stats(door.url)
    assert stats.keys() == STATS
    grown = {name: value - before[name] for name, value in stats.items() if value != before[name]}
    assert grown == {"vllm:gpu_prefix_cache_queries_total": 80, "vllm:gpu_prefix_cache_hits_total": 32}


@pytest.mark.parametrize("path", PAYLOADS)
async def test_static_backends_are_healthy(door: OpenAIDoor, web: httpx.AsyncClient, path: str) -> None:
    """Base and adapters answer what the health check sends; a model that is not there is not healthy."""
    router = Router(web)
    for model in ("base", "all", "rs", "wide"):
        assert await router.is_healthy(door.url, model, path)
    assert not await router.is_healthy(door.url, "nobody", path)


async def test_the_controller_brings_adapters_to_both(
    chatty: Built, web: httpx.AsyncClient, tmp_path: Path
) -> None:
    """Two loads at two replicas of one fleet: both are taken for done, and a third for what it is."""
    world = copied(chatty)
    source = str(world[0].adapters["rs"])
    controller = LoraController(web)
    async with open_builder(world, tmp_path) as builder, open_fleet(world, 2, builder=builder) as doors:
        for door in doors:
            await controller.load(door.url, "fresh", source)
            assert (await controller.registrations(door.url))["fresh"].startswith("rs@")
        with pytest.raises(LoraRefused, match="not below a folder"):
            await controller.load(doors[0].url, "lost", "/nowhere/at/all")
        await controller.unload(doors[0].url, "fresh")
        assert "fresh" not in await controller.registrations(doors[0].url)
