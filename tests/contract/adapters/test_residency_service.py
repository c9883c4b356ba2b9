"""A replica that loads and evicts adapters, as its requests see it, with a tiny model and real kernels."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
import pytest_asyncio

from inference_service.core.request import AnswerDelta, AnswerStarted, Request
from loramux_shared.bundle.deployments import current_generation
from loramux_shared.bundle.manifest import WEIGHTS_FILE, bundle_key
from loramux_shared.faults import BundleCorrupt
from loramux_shared.storage.memory import MemoryStore
from tests.support.service import PROMPT, Service, open_service
from tests.support.stores.killed import copy_store
from tests.support.tiny import ADAPTERS, World

Opened = Callable[..., Awaitable[Service]]
NAMES = sorted(ADAPTERS)
SMALL = 29_000 / 1e9
"""GB that hold the largest of the tiny adapters alone, or the two others."""


async def _tokens(service: Service, model: str, **fields: Any) -> tuple[str, list[int]]:
    """The digest that AnswerStarted named, and the tokens of an answer."""
    digest, tokens = "", list[int]()
    request = Request.of(model, PROMPT, **({"max_tokens": 8, "ignore_eos": True} | fields))
    async for event in service.ready.service.generate(request):
        if isinstance(event, AnswerStarted):
            digest = event.model.digest
        elif isinstance(event, AnswerDelta):
            tokens += [token.id for token in event.tokens]
    return digest, tokens


@pytest_asyncio.fixture
async def opened() -> AsyncIterator[Opened]:
    made: list[Service] = []

    async def opened(world: tuple[World, MemoryStore], **settings: Any) -> Service:
        made.append(await open_service(world, **settings))
        return made[-1]

    yield opened
    for service in made:
        await service.close()


@pytest.fixture(scope="module")
def expected(world: tuple[World, MemoryStore]) -> dict[str, list[int]]:
    """The greedy answer of each digest, of a replica that holds all of them."""

    async def ask() -> dict[str, list[int]]:
        service = await open_service(world)
        found = dict([await _tokens(service, name) for name in [*NAMES, "base"]])
        await service.close()
        return found

    return asyncio.run(ask())


@pytest.mark.parametrize("backend", ["auto", "torch"])
async def test_a_small_bank_serves_every_adapter_in_turn(
    opened: Opened, world: tuple[World, MemoryStore], expected: dict[str, list[int]], backend: str
) -> None:
    """Requests for all adapters at once are answered by a bank that cannot hold all as by one that can."""
    service = await opened(world, adapter_memory_gb=SMALL, preload=0, backend=backend)
    for _ in range(2):
        answers = await asyncio.gather(*(_tokens(service, name) for name in [*NAMES, "base"] * 3))
        assert all(tokens == expected[digest] for digest, tokens in answers)
    assert service.ready.bank.residency.stats.evictions >= 2


async def test_a_corrupt_bundle_is_refused_by_name_and_nobody_else_is(
    opened: Opened, world: tuple[World, MemoryStore], expected: dict[str, list[int]]
) -> None:
    """A flipped byte of one adapter: the replica starts, others are answered, and requests for it say why."""
    store = copy_store(world[1])
    generation = current_generation(store, "tiny")
    key = bundle_key(generation.adapters["all"].digest, WEIGHTS_FILE)
    data = bytearray(store.get(key))
    data[len(data) // 2] ^= 1
    store.put(key, bytes(data))
    service = await opened((world[0], store))
    for name in ("all", "wide", "all", "base"):
        if name == "all":
            with pytest.raises(BundleCorrupt, match="model 'all'"):
                await _tokens(service, name)
        else:
            digest, tokens = await _tokens(service, name)
            assert tokens == expected[digest]
