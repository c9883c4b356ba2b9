"""Fixtures of the tests of the engine's thread."""

from collections.abc import AsyncIterator

import pytest_asyncio

from tests.unit.serving.threads import Threads


@pytest_asyncio.fixture
async def threads() -> AsyncIterator[Threads]:
    made = Threads()
    yield made
    await made.end()
