"""A replica that follows its deployment, and the news of its builder."""

from __future__ import annotations

import asyncio

from inference_service.rpc.builder import BuilderNews
from inference_service.startup.load import Ready
from loramux.client import AsyncClient
from loramux_shared.settings import InferenceSettings


class Operators:
    """The tasks of a replica that follow its deployment and its builder, and the manager of its adapters."""

    def __init__(self, settings: InferenceSettings, ready: Ready, client: AsyncClient | None = None) -> None:
        """Follow nothing before `begin`; the builder's client is closed at the end."""
        self.outdated = ready.follower.outdated
        """Set where a replica is to end when it needs a restart."""
        self.manager = ready.service.adapters
        self._settings = settings
        self._ready = ready
        self._tasks: list[asyncio.Task[None]] = []
        self._client = client

    def begin(self) -> None:
        """Follow the deployment from now on, and listen to the builder where one is known."""
        follower = self._ready.follower
        self._tasks.append(asyncio.create_task(follower.run(), name="follower"))
        if self._ready.resolver is not None:
            self._tasks.append(asyncio.create_task(self._ready.resolver.run(), name="resolver"))
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
