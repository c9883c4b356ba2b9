"""Builds as a service: accepted at once, run in threads, watched by anyone, taken up after a restart."""

from __future__ import annotations

import asyncio
import base64
import binascii
import builtins
from collections import OrderedDict
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Final

import structlog

from builder_service.pipeline.build import BuildResult, build
from builder_service.pipeline.journal import Journal, JournalEntry
from builder_service.pipeline.running import RunningBuild
from builder_service.pipeline.validate import check_deployment
from builder_service.pipeline.views import DeploymentView, State, stored_view
from builder_service.pipeline.workshop import Workshop
from shared.bundle.deployments import is_deployment_name, list_deployments
from shared.deployment import Deployment
from shared.faults import (
    BuildInProgress,
    BuildInterrupted,
    DeploymentNotFound,
    Fault,
    InternalFault,
    PageTokenInvalid,
    RequestIdReused,
    ResourcesExhausted,
    ShuttingDown,
    StoreUnavailable,
)

log = structlog.get_logger()

MAX_ATTEMPTS: Final = 3
"""Starts of the builder that one build may outlive; then it is given up, for it may be what kills it."""
MAX_REQUEST_IDS: Final = 10_000
MAX_PAGE: Final = 1000
STOP_GRACE_S: Final = 15.0
"""For a build that was asked to stop, and waits for a network."""


@dataclass(frozen=True)
class Page:
    """A part of the list of deployments."""

    views: tuple[DeploymentView, ...]
    next_token: str
    """Empty on the last page."""


class Builds:
    """All builds of this process. Lives on the event loop; everything that blocks runs in threads."""

    def __init__(self, shop: Workshop, *, max_concurrent: int) -> None:
        self._shop = shop
        self._journal = Journal(shop.store)
        self._pool = ThreadPoolExecutor(max_concurrent, "build")
        self._builds: dict[str, RunningBuild] = {}
        self._requests: OrderedDict[str, RunningBuild] = OrderedDict()
        self._tasks: set[asyncio.Task[None]] = set()
        self._draining = False

    async def recover(self) -> int:
        """Take up the builds that the last run of the builder did not end; returns how many.

        Raises:
            StoreUnavailable: the store does not answer.
        """
        entries = await asyncio.to_thread(lambda: list(self._journal.entries()))
        for entry in entries:
            name, attempt = entry.deployment.model_name, entry.attempt + 1
            log.warning("build was interrupted, running it again", deployment=name, attempt=attempt)
            self._start(entry.model_copy(update={"attempt": attempt}))
        return len(entries)

    async def build(self, deployment: Deployment, request_id: str = "") -> DeploymentView:
        """Accept a build, or find the one that was asked for already; answers before it runs.

        Raises:
            DeploymentInvalid, RequestIdReused, BuildInProgress, StoreUnavailable, ShuttingDown
        """
        check_deployment(deployment)
        if self._draining:
            raise ShuttingDown(
                "the builder is shutting down and takes no new builds. Retry with its successor."
            )
        found = self._find(deployment, request_id)
        if found is None:
            found = self._start(
                JournalEntry(deployment=deployment, request_id=request_id, create_time=datetime.now(UTC))
            )
        self._remember(request_id, found)
        await found.accepted.wait()
        if found.refusal is not None:
            raise found.refusal
        return found.view()

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
        known = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
        raise DeploymentNotFound(f"no deployment {name[:128]!r}; there are {known or 'none'}")

    async def list(self, page_size: int, page_token: str) -> Page:
        """Return deployments by name; page_size 0 means 100.

        Raises:
            PageTokenInvalid, StoreUnavailable
        """
        after = _name_in(page_token)
        names = [name for name in await self._names() if name > after]
        size = min(page_size or 100, MAX_PAGE)
        views = [await self._view(name) for name in names[:size]]
        token = _token(names[size - 1]) if len(names) > size else ""
        return Page(tuple(view for view in views if view is not None), token)

    async def watch(self, name: str) -> AsyncIterator[DeploymentView]:
        """Yield a deployment's state, then each change, until it is ACTIVE or FAILED.

        Raises:
            DeploymentNotFound, StoreUnavailable, ShuttingDown
        """
        running = self._builds.get(name)
        if running is None or running.state is not State.BUILDING:
            yield await self.get(name)
            return
        async for view in running.views():
            yield view

    async def drain(self, timeout_s: float) -> None:
        """Take no new builds; let the running ones end, and interrupt them when the time is over."""
        self._draining = True
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=timeout_s)
        for running in self._builds.values():
            if running.state is State.BUILDING:
                running.progress.stop()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=STOP_GRACE_S)
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _find(self, deployment: Deployment, request_id: str) -> RunningBuild | None:
        known = self._requests.get(request_id) if request_id else None
        if known is not None:
            if known.deployment != deployment:
                raise RequestIdReused(
                    f"request_id {request_id!r} was used for another deployment or content. Draw a new one."
                )
            return known
        running = self._builds.get(deployment.model_name)
        if running is None or running.state is not State.BUILDING:
            return None
        if running.deployment != deployment:
            raise BuildInProgress(
                f"another build of {deployment.model_name!r} runs. Watch it, then call again."
            )
        return running

    def _start(self, entry: JournalEntry) -> RunningBuild:
        running = RunningBuild(entry)
        before = self._builds.get(running.name)
        self._builds[running.name] = running
        self._remember(entry.request_id, running)
        task = asyncio.create_task(self._run(running, before), name=f"build {running.name}")
        self._tasks.add(task)
        task.add_done_callback(lambda task: self._ended(task, running))
        return running

    async def _run(self, running: RunningBuild, before: RunningBuild | None) -> None:
        """Run a build to its end, which is told after the journal forgot it."""
        try:
            await self._accept(running)
        except Fault as fault:
            self._retract(running, before)
            running.refuse(fault)
            return
        try:
            result = await self._work(running)
        except BuildInterrupted:
            log.warning("build interrupted, it goes on at the next start", deployment=running.name)
            running.interrupt()
        except Fault as fault:
            log.warning("build failed", deployment=running.name, reason=fault.reason, problem=str(fault))
            await self._forget(running.name)
            running.fail(fault)
        else:
            log.info("build ended", deployment=running.name, generation=result.generation.number)
            await self._forget(running.name)
            running.succeed(result)

    async def _accept(self, running: RunningBuild) -> None:
        await asyncio.to_thread(self._journal.write, running.entry)
        stored = await asyncio.to_thread(stored_view, self._shop.store, running.name)
        running.accept(stored.generation if stored else 0)

    async def _work(self, running: RunningBuild) -> BuildResult:
        if running.entry.attempt > MAX_ATTEMPTS:
            raise InternalFault(
                f"the builder stopped {MAX_ATTEMPTS} times during this build, which was given up. "
                "Look into the builder's log, then build again."
            )
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(
                self._pool, build, running.deployment, self._shop, running.progress
            )
        except OSError as error:
            raise ResourcesExhausted(
                f"the builder's work folder: {error.strerror or type(error).__name__}. "
                "Free some space, or set --work-dir."
            ) from error

    def _retract(self, running: RunningBuild, before: RunningBuild | None) -> None:
        """Forget a build that was not accepted; the call may be repeated."""
        self._requests.pop(running.entry.request_id, None)
        if before is not None:
            self._builds[running.name] = before
        else:
            del self._builds[running.name]

    async def _forget(self, name: str) -> None:
        try:
            await asyncio.to_thread(self._journal.remove, name)
        except StoreUnavailable as fault:
            log.warning("journal entry stays; the build runs again at the next start", problem=fault.message)

    def _ended(self, task: asyncio.Task[None], running: RunningBuild) -> None:
        self._tasks.discard(task)
        problem = None if task.cancelled() else task.exception()
        if problem is not None:
            log.error("build failed inside", deployment=running.name, exc_info=problem)
            fault = InternalFault("loramux failed inside; the builder's log has the details. Please report it.")
            running.refuse(fault) if not running.accepted.is_set() else running.fail(fault)
            forgetting = asyncio.create_task(self._forget(running.name))
            self._tasks.add(forgetting)
            forgetting.add_done_callback(self._tasks.discard)

    def _remember(self, request_id: str, running: RunningBuild) -> None:
        if request_id:
            self._requests[request_id] = running
            self._requests.move_to_end(request_id)
            while len(self._requests) > MAX_REQUEST_IDS:
                self._requests.popitem(last=False)

    async def _view(self, name: str) -> DeploymentView | None:
        """Return the newest build of this process while it says more than the store does."""
        running = self._builds.get(name)
        if running is not None and running.state is State.BUILDING:
            return running.view()
        stored = (
            await asyncio.to_thread(stored_view, self._shop.store, name) if is_deployment_name(name) else None
        )
        number = stored.generation if stored else 0
        if running is not None and (running.state is State.FAILED or running.generation == number):
            return replace(running.view(), generation=number)
        return stored

    async def _names(self) -> builtins.list[str]:
        stored = await asyncio.to_thread(list_deployments, self._shop.store)
        return sorted({*stored, *self._builds})


def _token(name: str) -> str:
    return base64.urlsafe_b64encode(name.encode()).decode()


def _name_in(token: str) -> str:
    if not token:
        return ""
    try:
        name = base64.b64decode(token, altchars=b"-_", validate=True).decode()
    except (binascii.Error, ValueError) as error:
        raise PageTokenInvalid("page_token: use the next_page_token of the last answer") from error
    if not is_deployment_name(name):
        raise PageTokenInvalid("page_token: use the next_page_token of the last answer")
    return name
