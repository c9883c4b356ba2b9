"""A builder's views of its deployments: from its own builds, from the store, from generations of others."""

import asyncio
import builtins
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Final

import structlog

from builder_service.builds.journal import JournalEntry
from builder_service.builds.pages import GenerationView, Page, history, names_of_page
from builder_service.builds.running import WATCH_INTERVAL_S, RunningBuild
from builder_service.builds.views import BuildState, DeploymentView, stored_light, stored_view
from loramux_shared.bundle.deployments import is_deployment_name, list_deployments
from loramux_shared.faults import DeploymentNotFound, RequestIdReused, ShuttingDown, StoreUnavailable
from loramux_shared.rpc.stopping import wait_at_most
from loramux_shared.storage.base import Store
from loramux_shared.wording import listed


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
        """Yield a state, then each change of builds, and each generation; end with ShuttingDown."""
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
                    await wait_at_most(POLL_S, news)
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


MAX_REQUEST_IDS: Final = 10_000


class RequestIds:
    """The newest request ids; one that was forgotten, or is of an earlier run, is found by its content."""

    def __init__(self) -> None:
        self._builds: OrderedDict[str, RunningBuild] = OrderedDict()

    def find(self, entry: JournalEntry) -> RunningBuild | None:
        """Return the build of an entry's request id; raise RequestIdReused for another content."""
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

    async def list(self, page_size: int, page_token: str) -> Page[DeploymentView]:
        """Return deployments by name; page_size 0 means 100.

        Raises:
            PageTokenInvalid, StoreUnavailable
        """
        page = names_of_page(await self._names(), page_size, page_token)
        views = [await self._view(name) for name in page.items]
        return Page([view for view in views if view is not None], page.next_token)

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

    async def history(self, name: str, page_size: int, page_token: str) -> Page[GenerationView]:
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
        view = running.view()
        if running.state is BuildState.FAILED:  # until another builder, which may have the change, publishes
            is_newest = stored is None or stored.update_time <= view.update_time
        else:
            is_newest = running.generation == number
        return replace(view, generation=number) if is_newest else stored

    async def _names(self) -> builtins.list[str]:
        stored = await asyncio.to_thread(list_deployments, self._store)
        return sorted({*stored, *self._builds})
