"""A service of the tiny world that the tests of a module share, and that is free when a test begins."""

from collections.abc import AsyncIterator

import pytest_asyncio

from loramux_shared.storage.memory import MemoryStore
from tests.support.service import Service, open_service
from tests.support.tiny import World


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(world: tuple[World, MemoryStore]) -> AsyncIterator[Service]:
    service = await open_service(world)
    yield service
    await service.close()


@pytest_asyncio.fixture(loop_scope="module")
async def service(shared: Service) -> Service:
    """The service, which holds nothing."""
    await shared.until_free()
    return shared
