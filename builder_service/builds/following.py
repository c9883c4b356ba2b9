"""Deployments that this builder follows: its own builds, and the generations of all builders."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Final

import structlog

from builder_service.builds.running import WATCH_INTERVAL_S, RunningBuild
from builder_service.builds.views import BuildState, DeploymentView, stored_light
from loramux_shared.faults import ShuttingDown, StoreUnavailable
from loramux_shared.storage.base import Store


class News:
    """Wakes those that listen for a deployment."""

    def __init__(self) -> None:
        self._listeners: dict[str, set[asyncio.Event]] = {}

    @contextmanager
    def listen(self, name: str) -> Iterator[asyncio.Event]:
        """Yield an event that is set at each word of a deployment; the listener clears it."""
        event = asyncio.Event()
        self._listeners.setdefault(name, set()).add(event)
        try:
            yield event
        finally:
            self._listeners[name].discard(event)
            if not self._listeners[name]:
                del self._listeners[name]

    def tell(self, name: str) -> None:
        """Notify the watchers of a deployment."""
        for event in self._listeners.get(name, ()):
            event.set()

    def tell_all(self) -> None:
        """Say that something happened to all."""
        for name in tuple(self._listeners):
            self.tell(name)


log = structlog.get_logger()

POLL_S: Final = 2.0
"""Between two looks at the store, for what other builders publish."""


class Following:
    """The followers of this builder's deployments; of one deployment they share the looks at the store."""

    def __init__(self, store: Store, news: News, running: Callable[[str], RunningBuild | None]) -> None:
        """Follow deployments; running returns the build of one that runs, if one does."""
        self._store = store
        self._news = news
        self._running = running
        self._looks: dict[str, tuple[float, DeploymentView | None]] = {}
        self._ending = False

    def end(self) -> None:
        """End all streams, for the builder stops."""
        self._ending = True
        self._news.tell_all()

    def forget(self, name: str) -> None:
        """Read the deployment from the store again at the next call: it has another generation."""
        self._looks.pop(name, None)
        self._news.tell(name)

    async def follow(self, name: str, first: DeploymentView) -> AsyncIterator[DeploymentView]:
        """Yield a state, then each change of builds, and each generation, without an end.

        Raises:
            ShuttingDown: the builder stops.
        """
        reported, sent, build = first.generation, replace(first, adapters=()), None
        yield sent
        with self._news.listen(name) as news:
            try:
                while not self._ending:
                    news.clear()
                    build = build or self._running(name)
                    if build is not None:
                        build.watchers.add(news)
                        reported = max(reported, build.generation)  # other builds may publish meanwhile
                        view = replace(build.view(), generation=reported)
                        if view != sent:
                            sent = view
                            yield view
                        if view.state is not BuildState.BUILDING or build.interrupted:
                            build.watchers.discard(news)
                            build = None
                    stored = await self._look(name)
                    if stored is not None and stored.generation > reported:
                        reported, sent = stored.generation, stored
                        yield stored
                    with suppress(TimeoutError):
                        await asyncio.wait_for(news.wait(), POLL_S)
                    await asyncio.sleep(WATCH_INTERVAL_S if build else 0)
            finally:
                if build is not None:
                    build.watchers.discard(news)
        raise ShuttingDown("the builder stops. Follow its successor.")

    async def _look(self, name: str) -> DeploymentView | None:
        """Return what the store says, seldom enough; None where it says nothing."""
        at, found = self._looks.get(name, (0.0, None))
        if time.monotonic() - at > POLL_S / 2:
            try:
                found = await asyncio.to_thread(stored_light, self._store, name, found)
            except StoreUnavailable as fault:
                log.warning("store cannot be read for new generations", deployment=name, problem=fault.message)
            self._looks[name] = time.monotonic(), found
        return None if found is None or found.state is BuildState.FAILED else found
