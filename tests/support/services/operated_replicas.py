"""Replicas with operator APIs and the builder that they call, in this process and on its sockets."""

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from builder_service.pipeline.context import BuildContext
from inference_service.api.rpc.builder import BuilderPublisher
from inference_service.replica import Operators
from loramux.client import AsyncClient
from loramux_shared.settings import InferenceSettings
from loramux_shared.sources.open import open_sources
from loramux_shared.storage.memory import MemoryStore
from tests.support.builders import serve_builder
from tests.support.openai_api import OpenAIApi, serve_ready
from tests.support.tiny import World

Built = tuple[World, MemoryStore]


@asynccontextmanager
async def open_replica(world: Built, **settings: Any) -> AsyncIterator[OpenAIApi]:
    """Serve a world on a free port, and follow its deployment."""
    values = {"stream_interval_ms": 0, "follow_interval_s": 0.05} | settings
    client = AsyncClient(builder=values["builder"]) if "builder" in values else None
    publisher = None if client is None else BuilderPublisher(client, "tiny")
    ready = world[0].load(world[1], publisher=publisher, **values)
    operators = Operators(InferenceSettings(deployment="tiny", **values), ready, client)
    async with serve_ready(ready) as api:
        operators.begin()
        try:
            yield api
        finally:
            await operators.end()


@asynccontextmanager
async def open_fleet(world: Built, count: int, **settings: Any) -> AsyncIterator[list[OpenAIApi]]:
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(open_replica(world, **settings)) for _ in range(count)]


def open_builder(
    world: Built, folder: Path, hub_endpoint: str | None = None
) -> AbstractAsyncContextManager[str]:
    """Run a builder of a world that reads below its root, and a hub; yields its address."""
    sources = open_sources(local_roots=[world[0].root], hub_endpoint=hub_endpoint)
    return serve_builder(BuildContext(world[1], sources, folder))
