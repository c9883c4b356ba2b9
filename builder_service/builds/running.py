"""One accepted build: its state, the watchers of it, and why it failed; all on the event loop.

Failures are kept beside the work folder: a failed build leaves nothing in the store.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import structlog

from builder_service.builds.journal import JournalEntry, Ticket
from builder_service.builds.views import BuildState, DeploymentView
from builder_service.pipeline.build import BuildResult
from builder_service.pipeline.context import BuildContext
from builder_service.pipeline.progress import Progress, Stage
from loramux_shared.access.keys import ACCESS
from loramux_shared.bundle.manifest import Record, sha256_hex
from loramux_shared.faults import FAULTS, BundleCorrupt, Fault, Finding, InternalFault, ShuttingDown

log = structlog.get_logger()

MAX_FAILURES: Final = 1000
"""Failed builds whose records are kept."""


class FailedBuild(Record):
    """A build that failed."""

    entry: JournalEntry
    update_time: datetime
    reason: str
    message: str
    findings: tuple[Finding, ...] = ()

    @property
    def fault(self) -> Fault:
        """Return the fault with which the build failed."""
        return FAULTS.get(self.reason, InternalFault)(self.message, self.findings)


def place_of(context: BuildContext) -> Path | None:
    """Return where a builder keeps failures of builds into its store; one without an owner keeps none.

    The next owner of the same name may have another store, whose deployments these are not.
    """
    if not context.owner:
        return None
    store = sha256_hex(context.store.uri.encode())[:16]
    return context.place() / f"loramux-failed-{context.owner}-{store}"


class Failures:
    """One file per deployment whose newest build failed; without a folder, nothing is kept."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def write(self, failed: FailedBuild) -> None:
        """Keep a failure; where that is not possible, it is only logged."""
        if self._folder is None:
            return
        path = self._path(self._folder, failed.entry.name)
        try:
            self._folder.mkdir(mode=0o700, exist_ok=True)
            temporary = path.with_suffix(".tmp")
            temporary.write_bytes(failed.to_bytes())
            temporary.replace(path)
            paths = sorted(self._folder.glob("*.json"), key=lambda path: path.stat().st_mtime)
            for old in paths[:-MAX_FAILURES]:
                old.unlink()
        except OSError as error:
            log.warning("record of a failure could not be written", path=str(path), problem=error.strerror)

    def remove(self, name: str) -> None:
        """Forget a failure; a newer build did not fail."""
        if self._folder is not None:
            with suppress(OSError):
                self._path(self._folder, name).unlink()

    def all(self) -> Iterator[FailedBuild]:
        """Yield what is kept; a file that cannot be read is removed."""
        for path in sorted(self._folder.glob("*.json")) if self._folder else ():
            try:
                yield FailedBuild.from_bytes(path.read_bytes(), what=path.name)
            except (OSError, BundleCorrupt) as error:
                log.warning("record of a failure is damaged, ignored", path=str(path), problem=str(error))
                path.unlink(missing_ok=True)

    @staticmethod
    def _path(folder: Path, name: str) -> Path:
        return folder / f"{name}.json"


WATCH_INTERVAL_S: Final = 0.05
"""Between two states that a watcher gets; changes in between are merged."""


class RunningBuild:
    """A build from the moment it is accepted; it keeps its end."""

    def __init__(self, entry: JournalEntry) -> None:
        self.entry = entry
        self._ticket: Ticket | None = None
        self.recording = asyncio.Lock()
        """Held while its entry in the journal changes: it must not come back after it was removed."""
        self.key_id = ACCESS.get().key_id
        """API key of the call; empty: it was taken up, or none was needed."""
        self.state = BuildState.BUILDING
        self.generation = 0
        self.failure: Fault | None = None
        self.unchanged = False
        self.interrupted = False
        self.stopping = asyncio.Event()
        """Set once it was asked to end."""
        self.accepted = asyncio.Event()
        """Set once the build is in the journal, or could not be put there."""
        self.refusal: Fault | None = None
        """Why it could not be put there."""
        self.before: RunningBuild | None = None
        """The newest build of the deployment before this one, until this one is in the journal."""
        self.progress = Progress(entry.adapters, self._changed_in_thread)
        self._loop = asyncio.get_running_loop()
        self._update_time = datetime.now(UTC)
        self._notified = True
        self.watchers: set[asyncio.Event] = set()
        """Set at each change."""

    @property
    def name(self) -> str:
        """The deployment's name."""
        return self.entry.name

    def stop(self, why: Fault | None = None) -> None:
        """Ask it to end, with one of `progress.STOPS`; without one, it is interrupted."""
        self.progress.stop(why)
        self.stopping.set()

    async def wait_for(self, slots: asyncio.Semaphore) -> None:
        """Take one of the slots, which the caller releases; raise the fault with which the build is to end."""
        waiting, stopping = asyncio.create_task(slots.acquire()), asyncio.create_task(self.stopping.wait())
        await asyncio.wait({waiting, stopping}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if not waiting.done():
            waiting.cancel()
            self.progress.check()

    @property
    def ticket(self) -> Ticket:
        """Return the place in the journal of an accepted build."""
        assert self._ticket is not None  # noqa: S101 - nobody asks before
        return self._ticket

    def accept(self, ticket: Ticket, generation: int) -> None:
        """Go on as a recorded build, while this generation is served."""
        self._ticket, self.generation, self.before = ticket, generation, None
        self.accepted.set()

    def refuse(self, fault: Fault) -> None:
        """End without having been recorded."""
        self.fail(fault)
        self.refusal = self.failure
        self.accepted.set()

    def succeed(self, result: BuildResult) -> None:
        """End as ACTIVE."""
        self.state, self.generation = BuildState.ACTIVE, result.generation.number
        self.unchanged = result.unchanged
        self._changed()

    def fail(self, fault: Fault) -> None:
        """End as FAILED."""
        self.state, self.failure = BuildState.FAILED, fault.copy()
        self._changed()

    def record(self, fault: Fault) -> FailedBuild:
        """Return what can be kept of a build that is about to fail."""
        return FailedBuild(
            entry=self.entry,
            update_time=datetime.now(UTC),
            reason=fault.reason,
            message=fault.message,
            findings=fault.findings,
        )

    @classmethod
    def failed(cls, record: FailedBuild) -> RunningBuild:
        """Return a build that failed in an earlier run of the builder."""
        running = cls(record.entry)
        for name in {finding.adapter for finding in record.findings} & set(record.entry.adapters):
            running.progress.update(name, stage=Stage.REFUSED)
        running.accepted.set()
        running.state, running.failure, running._update_time = (
            BuildState.FAILED,
            record.fault,
            record.update_time,
        )
        return running

    def interrupt(self) -> None:
        """Stay unfinished here; another builder, or the next start of this one, goes on with it."""
        self.interrupted = True
        self._changed()

    def view(self) -> DeploymentView:
        """Return the present state."""
        return DeploymentView(
            self.name,
            self.state,
            self.generation,
            self.entry.create_time,
            self._update_time,
            self.progress.adapters,
            self.failure,
            self.unchanged,
        )

    async def views(self) -> AsyncIterator[DeploymentView]:
        """Yield the present state, then each change, until the build ends; raise ShuttingDown before that."""
        changed = asyncio.Event()
        self.watchers.add(changed)
        try:
            while True:
                changed.clear()
                view = self.view()
                yield view
                if view.state is not BuildState.BUILDING:
                    return
                if self.interrupted:
                    raise ShuttingDown(
                        "this builder stops; the build continues at another, or at its next start. Watch again."
                    )
                await changed.wait()
                await asyncio.sleep(WATCH_INTERVAL_S)
        finally:
            self.watchers.discard(changed)

    def _changed_in_thread(self) -> None:
        if self._notified:  # one wake-up for all changes until the loop runs
            self._notified = False
            self._loop.call_soon_threadsafe(self._changed)

    def _changed(self) -> None:
        self._notified = True
        self._update_time = datetime.now(UTC)
        for watcher in self.watchers:
            watcher.set()
