"""Composition of what operators see: a replica that follows its deployment, and can be told to change it."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime

from inference_service.adapters.bundles import StoredBundles
from inference_service.adapters.manager import AdapterManager
from inference_service.adapters.views import Facts
from inference_service.rpc.builder import BuilderNews, BuilderPublisher
from inference_service.startup.load import Ready
from loramux.client import AsyncClient
from loramux_shared.settings import InferenceSettings
from loramux_shared.storage.base import Store


class Operators:
    """The parts of a replica that follow its deployment and its builder, and the manager of its adapters."""

    def __init__(self, settings: InferenceSettings, store: Store, ready: Ready) -> None:
        """Connect them; nothing is followed before `begin`."""
        self.outdated = ready.follower.outdated
        """Set where a replica is to end when it needs a restart."""
        self._settings = settings
        self._ready = ready
        self._tasks: list[asyncio.Task[None]] = []
        self._client = AsyncClient(builder=settings.builder) if settings.builder else None
        self.manager = _manager(settings, store, ready, self._client)
        ready.service.metrics.show(self.manager, settings.metrics_models)

    def begin(self) -> None:
        """Follow the deployment from now on, and listen to the builder where one is known."""
        follower = self._ready.follower
        self._tasks.append(asyncio.create_task(follower.run(), name="follower"))
        if self._settings.builder:
            news = BuilderNews(self._settings.builder, self._settings.deployment, follower.nudge)
            self._tasks.append(asyncio.create_task(news.run(), name="news"))

    async def end(self) -> None:
        """Follow nothing any more."""
        for task in self._tasks:
            task.cancel()
        self._ready.follower.close()
        if self._client is not None:
            await self._client.close()


def _manager(
    settings: InferenceSettings, store: Store, ready: Ready, client: AsyncClient | None
) -> AdapterManager:
    facts = Facts(
        settings.deployment,
        datetime.now(UTC),
        ready.dtype,
        ready.generation.max_lora_rank,
    )
    return AdapterManager(
        ready.adapters,
        ready.follower,
        facts,
        bundles=StoredBundles(store, refused=bool(settings.require_signature))
        if ready.bank is not None
        else None,
        publisher=BuilderPublisher(client, settings.deployment) if client is not None else None,
        paused=lambda: ready.engine.paused,
    )
