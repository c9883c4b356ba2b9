"""Builds as a service: accepted at once, run in threads, watched by anyone, taken up after a restart."""

import asyncio
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from typing import Final, ParamSpec, TypeVar

import structlog

from builder_service.builds.journal import FIRST, LAST, Journal, JournalEntry, Order, TakenOver, Ticket
from builder_service.builds.keeper import BuildLimits, Keeper
from builder_service.builds.pushes import Pushes
from builder_service.builds.running import Failures, RunningBuild, place_of
from builder_service.builds.shown import BuildViews
from builder_service.builds.turns import MAX_ATTEMPTS, UNEXPECTED, Group, Turns
from builder_service.builds.views import BuildState, DeploymentView, served_number
from builder_service.pipeline.build import BuildResult, build
from builder_service.pipeline.context import BuildContext
from builder_service.pipeline.progress import INTERRUPTED, JointProgress
from builder_service.pipeline.update import Update, check_update, join_updates, rollback, update
from builder_service.pipeline.validate import check_deployment
from loramux_shared.access.keys import ACCESS
from loramux_shared.access.shares import is_in_share
from loramux_shared.bundle.deployments import Identity, find_applied
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
from loramux_shared.rpc.stopping import supervise, wait_at_most

P = ParamSpec("P")
T = TypeVar("T")

log = structlog.get_logger()

STOP_GRACE_S: Final = 15.0
"""Time that a build has to stop, for one that waits for a network."""
RETRY_S: Final = 1.0
"""Pause before the builder asks a store again that did not answer."""
RECORDING_THREADS: Final = 16
CANCELLED: Final = "a client cancelled the build; the deployment is unchanged"


class Builds(BuildViews):
    """All builds of this process. Lives on the event loop; everything that blocks runs in threads."""

    def __init__(self, context: BuildContext, limits: BuildLimits | None = None) -> None:
        super().__init__(context.store)
        self._context = context
        self._limits = limits or BuildLimits()
        loop = asyncio.get_running_loop()
        owner, lease_s = context.owner or "builder", self._limits.lease_s
        self._journal = Journal(context.store, owner, lease_s, lambda: loop.time())
        self.keeper = Keeper(context.store, self._journal, self._limits, self._take_up, lambda: loop.time())
        self._keeping: list[asyncio.Task[None]] = []
        self._recording = ThreadPoolExecutor(RECORDING_THREADS, "journal")
        self._places: dict[str, asyncio.Task[int]] = {}
        """Looks at the queues that have not begun."""
        self._looking: dict[str, asyncio.Lock] = {}
        self._ending = asyncio.Event()
        """Set where builds do not end here any more."""
        self._failures = Failures(place_of(context))
        self._pool = ThreadPoolExecutor(self._limits.running, "build")
        self._slots = asyncio.Semaphore(self._limits.running)
        self._turns = Turns(self._make, self._first_foreign)
        self._open: dict[RunningBuild, None] = {}
        """Those that have not ended, in order."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._draining = False
        self.pushes = Pushes(context, self.published)
        self.watchers: list[Callable[[RunningBuild], None]] = []
        """Called with each build that ended."""

    async def recover(self) -> int:
        """Take up the builds that earlier runs of the builder did not end, before any call; returns how many.

        From now on this builder gives signs of life, and takes over the builds of those that do not. Raise
        StoreUnavailable where the store does not answer.
        """
        for record in await asyncio.to_thread(lambda: list(self._failures.all())):
            failed = RunningBuild.failed(record)
            self._builds[failed.name] = failed
            self._requests.remember(failed.entry.request_id, failed)
        count = await self.keeper.recover()
        for name, work in (("heartbeat", self.keeper.beat), ("takeover", self.keeper.look)):
            self._keeping.append(asyncio.create_task(supervise(name, work), name=name))
        return count

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
            identity = Identity((entry.draw_id(),))
            await asyncio.to_thread(check_update, self._context.store, wish, identity)
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
            self._require_room()
            found = self._start(entry)
        self._requests.remember(entry.request_id, found)
        await found.accepted.wait()
        if found.refusal is not None:
            raise found.refusal
        return found.view()

    def _require_room(self) -> None:
        """Refuse a build where as many as may wait already, or the key has its share of them."""
        waiting, key_id = self.count_running(), ACCESS.get().key_id
        left = self._limits.running + self._limits.waiting - waiting
        if left <= 0:
            raise QueueFull(f"{waiting} builds run or wait, which is the limit. Call again later.")
        held = Counter(running.key_id for running in self._open)
        if not is_in_share(key_id, held, waiting + left):
            raise QueueFull(
                f"{held[key_id]} builds of this key run or wait, which is its share of {waiting + left}. "
                "Call again later."
            )

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
            async with running.recording:
                if running.state is BuildState.BUILDING and running in self._open:
                    running.entry = running.entry.model_copy(update={"cancelled": True})
                    await self._in_thread(self._journal.replace, running.ticket, running.entry)
                    running.stop(BuildCancelled(CANCELLED))
        return last.view()

    async def drain(self, timeout_s: float) -> None:
        """Take no new builds; let the running ones end, and interrupt them when the time is over."""
        self._draining = True
        self._following.end()
        self.pushes.stop()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=timeout_s)
        self._ending.set()
        for running in self._open:
            running.stop()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=STOP_GRACE_S)
        for keeping in self._keeping:
            keeping.cancel()
        self.keeper.close()
        self._recording.shutdown(wait=False)
        self._pool.shutdown(wait=False, cancel_futures=True)
        if not self._tasks:
            with suppress(StoreUnavailable):  # others wait for a lease then
                await asyncio.to_thread(self._journal.end_run)

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

    def _start(self, entry: JournalEntry, ticket: Ticket | None = None) -> RunningBuild:
        running = RunningBuild(entry)
        running.before = self._builds.get(running.name)
        self._builds[running.name] = running
        self._open[running] = None
        self._requests.remember(entry.request_id, running)
        self._news.tell(running.name)
        task = asyncio.create_task(self._run(running, ticket), name=f"build {running.name}")
        self._tasks.add(task)
        task.add_done_callback(lambda task: self._ended(task, running))
        return running

    async def _take_up(self, ticket: Ticket, entry: JournalEntry) -> None:
        log.warning("build was interrupted, running it again", deployment=entry.name, attempt=entry.attempt)
        await self._start(entry, ticket).accepted.wait()

    async def _run(self, running: RunningBuild, ticket: Ticket | None) -> None:
        """Run a build to its end, which is reported after the journal forgot it."""
        try:
            served = await self._find_served(running.name, is_recorded=ticket is not None)
            running.accept(ticket or await self._record(running.entry), served)
        except Fault as fault:
            self._retract(running)
            running.refuse(fault)
            return
        try:
            end = await self._outcome(running)
        except (BuildInterrupted, TakenOver) as why:
            log.warning(
                "build was interrupted, it continues at another builder or start", deployment=running.name
            )
            if isinstance(why, TakenOver):
                self._retract(running)
            running.interrupt()
            return
        self._open.pop(running, None)
        if isinstance(end, Fault):
            log.warning("build failed", deployment=running.name, reason=end.reason, problem=str(end))
            running.fail(end)
        else:
            log.info("build ended", deployment=running.name, generation=end.generation.number)
            running.succeed(end)

    async def _find_served(self, name: str, *, is_recorded: bool) -> int:
        """Return the number of the served generation; what is recorded runs also where nobody knows it: 0."""
        try:
            return await self._in_thread(served_number, self._context.store, name)
        except StoreUnavailable:
            if is_recorded:
                return 0
            raise

    async def _record(self, entry: JournalEntry) -> Ticket:
        """Put an entry behind all others of its deployment; calls at the same moment share a look at those."""
        pending = self._places.get(entry.name)
        if pending is None:
            pending = self._places[entry.name] = asyncio.create_task(self._look(entry.name))
        return await self._in_thread(self._journal.add, await pending, entry.draw_id(), entry)

    async def _look(self, name: str) -> int:
        try:
            async with self._looking.setdefault(name, asyncio.Lock()):
                del self._places[name]  # a call from now on needs a later look
                return await self._in_thread(self._journal.next_place, name)
        finally:
            if name not in self._places:
                self._looking.pop(name, None)

    async def _outcome(self, running: RunningBuild) -> BuildResult | Fault:
        """Return the end of a build, which the journal has forgotten then.

        Raises:
            BuildInterrupted: the builder stops first.
            TakenOver: another builder has it.
        """
        try:
            result = await self._turns.result(running)
        except BuildInterrupted:
            raise
        except Fault as fault:
            applied = await self._retry(find_applied, self._context.store, running.name, running.ticket.change)
            if applied is None:
                await asyncio.to_thread(self._failures.write, running.record(fault))
                try:
                    await self._forget(running)
                except TakenOver:
                    await asyncio.to_thread(self._failures.remove, running.name)
                    raise
                return fault
            result = BuildResult(applied, unchanged=False)
        await asyncio.to_thread(self._failures.remove, running.name)
        with suppress(TakenOver):  # it finds itself published there
            await self._forget(running)
        return result

    async def _forget(self, running: RunningBuild) -> None:
        async with running.recording:
            await self._retry(self._journal.remove, running.ticket)

    async def _retry(self, operation: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Return what a store answers, however late; raise BuildInterrupted where the builder stops."""
        while True:
            try:
                return await self._in_thread(operation, *args, **kwargs)
            except StoreUnavailable as fault:
                log.warning("journal waits for the store, trying again", problem=fault.message)
            if self._ending.is_set():
                raise BuildInterrupted(INTERRUPTED)
            await wait_at_most(RETRY_S, self._ending)

    async def _in_thread(self, operation: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._recording, partial(operation, *args, **kwargs))

    async def _first_foreign(self, name: str) -> Order:
        try:
            queue = await self._in_thread(self._journal.queue, name)
        except StoreUnavailable as fault:
            log.warning("builds wait for the store", deployment=name, problem=fault.message)
            return FIRST
        left, run = self.keeper.left, self._journal.run
        return next((each.order for each in queue if each.run != run and each not in left), LAST)

    async def _make(self, group: Group) -> BuildResult:
        """Run builds of one deployment as one, when there is a slot for them."""
        first, tickets = group[0], [running.ticket for running in group]
        if first.entry.cancelled:
            raise BuildCancelled(CANCELLED)
        if first.entry.attempt > MAX_ATTEMPTS:
            raise InternalFault(
                f"the builder stopped {MAX_ATTEMPTS} times during this build, so it was abandoned. "
                "Check the builder's log, then build again."
            )
        await first.wait_for(self._slots)
        identity = Identity(tuple(ticket.change for ticket in tickets), partial(self._journal.require, tickets))
        progress = JointProgress([running.progress for running in group]) if len(group) > 1 else first.progress
        if (whole := first.entry.deployment) is not None:
            options = {"verify": first.entry.verify, "exact": first.entry.exact}
            work = partial(build, whole, self._context, progress, identity=identity, **options)
        else:
            wish = join_updates([running.entry.update for running in group if running.entry.update])
            work = partial(update, wish, self._context, progress, identity)
        loop, timeout_s = asyncio.get_running_loop(), self._limits.timeout_s
        late = BuildTimedOut(f"the build took longer than {timeout_s:g} s, which is the limit of this builder")
        timer = loop.call_later(timeout_s, _stop, group, late)
        try:
            return await loop.run_in_executor(self._pool, work)
        except OSError as error:
            raise ResourcesExhausted(
                f"the builder's work folder: {error.strerror or type(error).__name__}. "
                "Free some space, or set LORAMUX_WORK_DIR."
            ) from error
        finally:
            timer.cancel()
            self._slots.release()

    def _retract(self, running: RunningBuild) -> None:
        """Forget a build that was not accepted, or is another builder's now; the call may be repeated."""
        self._open.pop(running, None)
        self._requests.forget(running.entry.request_id)
        if self._builds.get(running.name) is running:
            del self._builds[running.name]
            before = running.before
            while before is not None and before.refusal is not None:
                before = before.before
            if before is not None:
                self._builds[running.name] = before

    def _ended(self, task: asyncio.Task[None], running: RunningBuild) -> None:
        self._tasks.discard(task)
        self._open.pop(running, None)
        problem = None if task.cancelled() else task.exception()
        if problem is not None:
            log.error("build failed: unexpected error", deployment=running.name, exc_info=problem)
            fault = InternalFault(UNEXPECTED)
            running.refuse(fault) if not running.accepted.is_set() else running.fail(fault)
        for watcher in self.watchers:
            watcher(running)
        self._following.forget(running.name)


def _stop(group: Group, why: Fault) -> None:
    for running in group:
        running.stop(why)
