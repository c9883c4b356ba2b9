"""A tiny model for all tests of the HTTP API, with a server that is idle when a test begins."""

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from loramux_shared.storage.memory import MemoryStore
from tests.support.openai_api import OpenAIApi, open_api, openai_world
from tests.support.tiny import World


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[World, MemoryStore]:
    """A tiny Llama with a chat template and three adapters, built."""
    return openai_world(tmp_path_factory.mktemp("openai"))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def opened(world: tuple[World, MemoryStore]) -> AsyncIterator[OpenAIApi]:
    """A server that the tests of a module share."""
    async with open_api(world) as api:
        yield api


@pytest_asyncio.fixture(loop_scope="module")
async def api(opened: OpenAIApi) -> OpenAIApi:
    """The same, once it holds nothing of the test before."""
    await opened.until_free()
    return opened
