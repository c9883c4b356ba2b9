"""Replicas with operator APIs and the builder that they call, in this process and on its sockets."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from builder_service.builds.builds import Builds
from builder_service.builds.keeper import BuildLimits
from builder_service.pipeline.check import Checks
from builder_service.pipeline.context import BuildContext
from builder_service.rpc.servicer import SERVICE_NAME, BuilderServicer
from inference_service.http.server import HttpServer
from inference_service.replica import Operators
from inference_service.rpc.builder import BuilderPublisher
from loramux.client import AsyncClient
from loramux_shared.access.guard import NOBODY_GUARDS, Guard
from loramux_shared.rpc.server import RpcServer
from loramux_shared.settings import InferenceSettings
from loramux_shared.sources.open import open_sources
from loramux_shared.storage.memory import MemoryStore
from tests.support.openai_api import OpenAIApi
from tests.support.tiny import World
from tests.support.waiting import BOUND_S

Built = tuple[World, MemoryStore]


@asynccontextmanager
async def open_replica(world: Built, guard: Guard = NOBODY_GUARDS, **settings: Any) -> AsyncIterator[OpenAIApi]:
    """Serve a world on a free port, and follow its deployment."""
    values = {"stream_interval_ms": 0, "follow_interval_s": 0.05} | settings
    client = AsyncClient(builder=values["builder"]) if "builder" in values else None
    publisher = None if client is None else BuilderPublisher(client, "tiny")
    ready = world[0].load(world[1], publisher=publisher, **values)
    operators = Operators(InferenceSettings(deployment="tiny", **values), ready, client)
    server = HttpServer("127.0.0.1:0", ready.service, guard)
    await server.start()
    ready.engine.start()
    operators.begin()
    api = OpenAIApi(ready, server)
    try:
        yield api
    finally:
        await operators.end()
        await api.http.aclose()
        await api.openai.close()
        await server.drain(BOUND_S)
        await ready.engine.stop()


@asynccontextmanager
async def open_fleet(world: Built, count: int, **settings: Any) -> AsyncIterator[list[OpenAIApi]]:
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(open_replica(world, **settings)) for _ in range(count)]


@asynccontextmanager
async def open_builder(world: Built, folder: Path, hub_endpoint: str | None = None) -> AsyncIterator[str]:
    """Run a builder of a world that reads below its root, and a hub; yields its address."""
    sources = open_sources(local_roots=[world[0].root], hub_endpoint=hub_endpoint)
    context = BuildContext(world[1], sources, folder)
    builds = Builds(context, BuildLimits(running=1))
    server = RpcServer("127.0.0.1:0", {SERVICE_NAME: BuilderServicer(builds, Checks(context)).register})
    address = await server.start()
    await builds.recover()
    await server.set_serving(True)
    try:
        yield address
    finally:
        await builds.drain(BOUND_S)
        await server.drain(BOUND_S)
