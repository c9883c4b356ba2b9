"""Builds as a service: accepted at once, run in threads, watched by anyone, taken up after a restart."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Final

import structlog

from builder_service.builds.journal import BuildLimits, Journal, JournalEntry, Keeper
from builder_service.builds.pushes import Pushes
from builder_service.builds.running import Failures, RunningBuild, place_of
from builder_service.builds.shown import BuildViews
from builder_service.builds.turns import MAX_ATTEMPTS, Group, Turns
from builder_service.builds.views import BuildState, DeploymentView, served_number
from builder_service.pipeline.build import BuildResult
from builder_service.pipeline.context import BuildContext
from builder_service.pipeline.progress import JointProgress
from builder_service.pipeline.update import Update, check_update, joined, rollback
from builder_service.pipeline.validate import check_deployment
from loramux_shared.deployment import Deployment
from loramux_shared.faults import (
    BuildCancelled,
    BuildInProgress,
    BuildInterrupted,
    BuildTimedOut,
    Fault,
    InternalFault,
    QueueFull,
    ResourcesExhausted,
    ShuttingDown,
    StoreUnavailable,
)

log = structlog.get_logger()

STOP_GRACE_S: Final = 15.0
"""For a build that was asked to stop, and waits for a network."""
CANCELLED: Final = "a client cancelled the build; the deployment is unchanged"


class Builds(BuildViews):
    """All builds of this process. Lives on the event loop; everything that blocks runs in threads."""

    def __init__(self, context: BuildContext, limits: BuildLimits | None = None) -> None:
        super().__init__(context.store)
        self._context = context
        self._limits = limits or BuildLimits()
        self._journal = Journal(context.store, context.owner or "builder")
        self._failures = Failures(place_of(context))
        self._pool = ThreadPoolExecutor(self._limits.running, "build")
        self._slots = asyncio.Semaphore(self._limits.running)
        self._turns = Turns(self._make)
        self._open: dict[RunningBuild, None] = {}
        """Those that have not ended, in order."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._keeping: asyncio.Task[None] | None = None
        self._draining = False
        self.pushes = Pushes(context, self.published)
        self.on_end: Callable[[RunningBuild], None] = lambda _: None
        """Called with each build that ended."""

    async def recover(self) -> int:
        """Take up the builds that the last run of the builder did not end; returns how many.

        From now on this builder gives signs of life, and takes over the builds of those that do not. Raise
        StoreUnavailable where the store does not answer.
        """
        for record in await asyncio.to_thread(lambda: list(self._failures.all())):
            failed = RunningBuild.failed(record)
            self._builds[failed.name] = failed
            self._requests.remember(failed.entry.request_id, failed)
        entries = await asyncio.to_thread(self._journal.mine)
        for entry in entries:
            self._take_up(entry)
        keeper = Keeper(self._journal, self._limits, self._take_over)
        self._keeping = asyncio.create_task(keeper.run(), name="journal")
        return len(entries)

    async def build(
        self, deployment: Deployment, request_id: str = "", *, verify: bool = False, exact: bool = False
    ) -> DeploymentView:
        """Accept a build, or find the one that was asked for already; answers before it runs.

        With exact, adapters that were added or pushed and are not in the deployment leave.

        Raises:
            DeploymentInvalid, RequestIdReused, BuildInProgress, QueueFull, StoreUnavailable, ShuttingDown
        """
        check_deployment(deployment)
        entry = JournalEntry(
            deployment=deployment,
            verify=verify,
            exact=exact,
            request_id=request_id,
            create_time=datetime.now(UTC),
        )
        return await self._accepted(entry)

    async def update(self, wish: Update, request_id: str = "") -> DeploymentView:
        """Accept an update, or find the one of an earlier call with the same id; return before it runs.

        Where other builds of the deployment have not ended, the update is judged when its turn comes: then it
        ends as FAILED with what is raised here otherwise.

        Raises:
            DeploymentInvalid: the names do not fit together.
            DeploymentNotFound: there is no such deployment.
            AdapterNotFound: an adapter that the update removes does not exist.
            AdapterExists: an adapter that must be new exists.
            GenerationMismatch: the newest generation is another than the expected one.
            BundleCorrupt: the newest generation cannot be read.
            RecordTooLarge: an object of the store exceeds its bound.
            SignatureInvalid: it has no signature of a signer that this builder trusts.
            RequestIdReused, QueueFull, StoreUnavailable, ShuttingDown
        """
        entry = JournalEntry(update=wish, request_id=request_id, create_time=datetime.now(UTC))
        if self._find(entry) is None and self._running(wish.name) is None:
            await asyncio.to_thread(check_update, self._context.store, wish)
        return await self._accepted(entry)

    async def rollback(self, name: str, to: int | None, expected: int | None) -> BuildResult:
        """Publish the content of an older generation; None: of the one before the newest.

        Raises:
            DeploymentNotFound, GenerationNotFound, GenerationMismatch, BundleCorrupt, RecordTooLarge,
            SignatureInvalid, StoreUnavailable, ShuttingDown
        """
        self._refuse_when_draining()
        result = await asyncio.to_thread(rollback, name, to, expected, self._context)
        await self.published(name)
        return result

    async def published(self, name: str) -> None:
        """Take note of a generation that no build published: what builds said before it is history."""
        running = self._builds.get(name)
        if running is not None and running.state is not BuildState.BUILDING:
            del self._builds[name]
        await asyncio.to_thread(self._failures.remove, name)
        self._following.forget(name)

    async def _accepted(self, entry: JournalEntry) -> DeploymentView:
        self._refuse_when_draining()
        found = self._find(entry)
        if found is None:
            waiting = self.count_running()
            if waiting >= self._limits.running + self._limits.waiting:
                raise QueueFull(f"{waiting} builds run or wait, which is the limit. Call again later.")
            found = self._start(entry)
        self._requests.remember(entry.request_id, found)
        await found.accepted.wait()
        if found.refusal is not None:
            raise found.refusal
        return found.view()

    def _refuse_when_draining(self) -> None:
        if self._draining:
            raise ShuttingDown(
                "the builder is shutting down and takes no new builds. Retry with its successor."
            )

    async def cancel(self, name: str) -> DeploymentView:
        """Ask all builds of a deployment that run or wait to end as FAILED; without one, nothing changes.

        Raises:
            DeploymentNotFound, StoreUnavailable
        """
        last = self._running(name)
        if last is None:
            return await self.get(name)
        for running in [running for running in self._open if running.name == name]:
            await running.accepted.wait()
            if running.state is BuildState.BUILDING:
                running.entry = running.entry.model_copy(update={"cancelled": True})
                await asyncio.to_thread(self._journal.update, running.key, running.entry)
                running.stop(BuildCancelled(CANCELLED))
        return last.view()

    async def drain(self, timeout_s: float) -> None:
        """Take no new builds; let the running ones end, and interrupt them when the time is over."""
        self._draining = True
        self._following.end()
        self.pushes.stop()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=timeout_s)
        for running in self._open:
            running.stop()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=STOP_GRACE_S)
        if self._keeping is not None:
            self._keeping.cancel()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def count_running(self) -> int:
        """Return how many builds run or wait, on any thread."""
        return len(self._open)

    def _find(self, entry: JournalEntry) -> RunningBuild | None:
        known = self._requests.find(entry)
        if known is not None:
            return known
        others = [running for running in self._open if running.name == entry.name]
        if entry.update is None or not entry.update.must_be_new:
            same = next((running for running in others if running.entry.wish == entry.wish), None)
            if same is not None:
                return same
        if others and entry.update is None:
            raise BuildInProgress(f"another build of {entry.name!r} runs. Watch it, then call again.")
        return None

    def _start(self, entry: JournalEntry) -> RunningBuild:
        running = RunningBuild(entry)
        running.before = self._builds.get(running.name)
        self._builds[running.name] = running
        self._open[running] = None
        self._journal.add(running.key, entry)
        self._requests.remember(entry.request_id, running)
        self._news.tell(running.name)
        task = asyncio.create_task(self._run(running), name=f"build {running.name}")
        self._tasks.add(task)
        task.add_done_callback(lambda task: self._ended(task, running))
        return running

    def _take_up(self, entry: JournalEntry) -> RunningBuild:
        name, attempt = entry.name, entry.attempt + 1
        log.warning("build was interrupted, running it again", deployment=name, attempt=attempt)
        return self._start(entry.model_copy(update={"attempt": attempt}))

    async def _run(self, running: RunningBuild) -> None:
        """Run a build to its end, which is reported after the journal forgot it."""
        try:
            await self._accept(running)
        except Fault as fault:
            self._retract(running)
            running.refuse(fault)
            return
        try:
            result = await self._turns.result(running)
        except BuildInterrupted:
            log.warning("build was interrupted, it continues at the next start", deployment=running.name)
            self._journal.leave(running.name)
            running.interrupt()
        except Fault as fault:
            log.warning("build failed", deployment=running.name, reason=fault.reason, problem=str(fault))
            await asyncio.to_thread(self._failures.write, running.record(fault))
            await self._forget(running)
            self._open.pop(running, None)
            running.fail(fault)
        else:
            log.info("build ended", deployment=running.name, generation=result.generation.number)
            await asyncio.to_thread(self._failures.remove, running.name)
            await self._forget(running)
            self._open.pop(running, None)
            running.succeed(result)

    async def _accept(self, running: RunningBuild) -> None:
        await asyncio.to_thread(self._journal.save, running.key, running.name)
        running.accept(await asyncio.to_thread(served_number, self._context.store, running.name))

    async def _make(self, group: Group) -> BuildResult:
        """Run builds of one deployment as one, when there is a slot for them."""
        first = group[0]
        if first.entry.cancelled:
            raise BuildCancelled(CANCELLED)
        if first.entry.attempt > MAX_ATTEMPTS:
            raise InternalFault(
                f"the builder stopped {MAX_ATTEMPTS} times during this build, so it was abandoned. "
                "Check the builder's log, then build again."
            )
        await first.wait_for(self._slots)
        entry, progress = first.entry, first.progress
        if len(group) > 1:
            wish = joined([running.entry.update for running in group if running.entry.update])
            entry = entry.model_copy(update={"update": wish})
            progress = JointProgress([running.progress for running in group])
        loop, timeout_s = asyncio.get_running_loop(), self._limits.timeout_s
        late = BuildTimedOut(f"the build took longer than {timeout_s:g} s, which is the limit of this builder")
        timer = loop.call_later(timeout_s, _stop, group, late)
        try:
            return await loop.run_in_executor(self._pool, entry.run, self._context, progress)
        except OSError as error:
            raise ResourcesExhausted(
                f"the builder's work folder: {error.strerror or type(error).__name__}. "
                "Free some space, or set LORAMUX_WORK_DIR."
            ) from error
        finally:
            timer.cancel()
            self._slots.release()

    async def _take_over(self, entry: JournalEntry) -> bool:
        """Run the build of another builder; True when its entry is not needed any more."""
        others = [running for running in self._open if running.name == entry.name]
        if any(running.entry.wish == entry.wish for running in others):
            return True
        if self._draining or (others and entry.update is None):
            return False
        running = self._take_up(entry)
        await running.accepted.wait()
        return running.refusal is None

    def _retract(self, running: RunningBuild) -> None:
        """Forget a build that was not accepted; the call may be repeated."""
        self._open.pop(running, None)
        self._requests.forget(running.entry.request_id)
        if self._builds.get(running.name) is running:
            del self._builds[running.name]
            before = running.before
            while before is not None and before.refusal is not None:
                before = before.before
            if before is not None:
                self._builds[running.name] = before

    async def _forget(self, running: RunningBuild) -> None:
        try:
            await asyncio.to_thread(self._journal.remove, running.key, running.name)
        except StoreUnavailable as fault:
            log.warning(
                "journal entry could not be removed, so the build runs again at the next start",
                problem=fault.message,
            )

    def _ended(self, task: asyncio.Task[None], running: RunningBuild) -> None:
        self._tasks.discard(task)
        self._open.pop(running, None)
        problem = None if task.cancelled() else task.exception()
        if problem is not None:
            log.error("build failed: unexpected error", deployment=running.name, exc_info=problem)
            fault = InternalFault("internal error; the builder's log has the details. Please report it.")
            running.refuse(fault) if not running.accepted.is_set() else running.fail(fault)
            forgetting = asyncio.create_task(self._forget(running))
            self._tasks.add(forgetting)
            forgetting.add_done_callback(self._tasks.discard)
        self.on_end(running)
        self._following.forget(running.name)


def _stop(group: Group, why: Fault) -> None:
    for running in group:
        running.stop(why)
