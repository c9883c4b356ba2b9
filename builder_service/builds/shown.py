"""A builder's views of its deployments: from the running builds, and from the store."""

from __future__ import annotations

import asyncio
import builtins
from collections import OrderedDict
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Final

from builder_service.builds.following import Following, News
from builder_service.builds.history import HistoryPage, history
from builder_service.builds.journal import JournalEntry
from builder_service.builds.pages import Page, names_of_page
from builder_service.builds.running import RunningBuild
from builder_service.builds.views import BuildState, DeploymentView, stored_view
from loramux_shared.bundle.deployments import is_deployment_name, list_deployments
from loramux_shared.faults import DeploymentNotFound, RequestIdReused
from loramux_shared.storage.base import Store
from loramux_shared.wording import listed

MAX_REQUEST_IDS: Final = 10_000


class RequestIds:
    """The newest request ids; one that was forgotten, or is of an earlier run, is found by its content."""

    def __init__(self) -> None:
        self._builds: OrderedDict[str, RunningBuild] = OrderedDict()

    def find(self, entry: JournalEntry) -> RunningBuild | None:
        """Return the build of an entry's request id.

        Raises:
            RequestIdReused: it was used for another deployment.
        """
        known = self._builds.get(entry.request_id) if entry.request_id else None
        if known is not None and known.entry.wish != entry.wish:
            raise RequestIdReused(
                f"request_id {entry.request_id!r} was used for another deployment or content. Draw a new one."
            )
        return known

    def of(self, request_id: str) -> RunningBuild | None:
        """Return the build that a request id led to, while that is remembered."""
        return self._builds.get(request_id)

    def remember(self, request_id: str, running: RunningBuild) -> None:
        """Let a request id lead to a build."""
        if request_id:
            self._builds[request_id] = running
            self._builds.move_to_end(request_id)
            while len(self._builds) > MAX_REQUEST_IDS:
                self._builds.popitem(last=False)

    def forget(self, request_id: str) -> None:
        """Let a request id be used again."""
        self._builds.pop(request_id, None)


class BuildViews:
    """The half of `Builds` that changes nothing."""

    def __init__(self, store: Store) -> None:
        """Know of no build yet."""
        self._store = store
        self._builds: dict[str, RunningBuild] = {}
        self._requests = RequestIds()
        self._news = News()
        self._following = Following(store, self._news, self._running)

    async def get(self, name: str) -> DeploymentView:
        """Return a deployment.

        Raises:
            DeploymentNotFound: the message lists those that exist.
            StoreUnavailable: the store does not answer.
        """
        view = await self._view(name)
        if view is not None:
            return view
        names = await self._names()
        raise DeploymentNotFound(f"no deployment {name[:128]!r}; there are {listed(names)}")

    async def list(self, page_size: int, page_token: str) -> Page:
        """Return deployments by name; page_size 0 means 100.

        Raises:
            PageTokenInvalid, StoreUnavailable
        """
        page = names_of_page(await self._names(), page_size, page_token)
        views = [await self._view(name) for name in page.names]
        return Page(tuple(view for view in views if view is not None), page.next_token)

    async def watch(
        self, name: str, *, follow: bool = False, request_id: str = ""
    ) -> AsyncIterator[DeploymentView]:
        """Yield a deployment's state, then each change, until it is ACTIVE or FAILED; with follow, for ever.

        With the request id of a build that this process knows, the states are those of that build.

        Raises:
            DeploymentNotFound, StoreUnavailable, ShuttingDown
        """
        tracked = self._requests.of(request_id)
        running = tracked if tracked is not None and tracked.name == name else self._running(name)
        if follow:
            async for view in self._following.follow(name, running.view() if running else await self.get(name)):
                yield view
        elif running is None:
            yield await self._view(name, late=True) or await self.get(name)
        else:
            async for view in running.views():
                yield view

    async def history(self, name: str, page_size: int, page_token: str) -> HistoryPage:
        """Return a page of a deployment's generations, the newest first; page_size 0 means 20.

        Raises:
            DeploymentNotFound, PageTokenInvalid, StoreUnavailable
        """
        return await asyncio.to_thread(history, self._store, name, page_size, page_token)

    def _running(self, name: str) -> RunningBuild | None:
        running = self._builds.get(name)
        return running if running is not None and running.state is BuildState.BUILDING else None

    async def _view(self, name: str, *, late: bool = False) -> DeploymentView | None:
        """Return the newest build of this process while it says more than the store does.

        With late, for a watcher who may have called before it ended: an update that ended says so itself.
        """
        if (running := self._running(name)) is not None:
            return running.view()
        running = self._builds.get(name)
        stored = await asyncio.to_thread(stored_view, self._store, name) if is_deployment_name(name) else None
        number = stored.generation if stored else 0
        if running is None or (
            running.entry.update is not None and running.state is BuildState.ACTIVE and not late
        ):
            return stored  # the build of an update knows only the adapters that the update names
        if running.state is BuildState.FAILED or running.generation == number:
            return replace(running.view(), generation=number)
        return stored

    async def _names(self) -> builtins.list[str]:
        stored = await asyncio.to_thread(list_deployments, self._store)
        return sorted({*stored, *self._builds})
