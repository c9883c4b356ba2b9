"""Why builds failed, kept beside the work folder: a failed build leaves nothing in the store."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Final

import structlog

from builder_service.builds.journal import JournalEntry
from builder_service.pipeline.context import BuildContext
from loramux_shared.bundle.manifest import Record, sha256_hex
from loramux_shared.faults import FAULTS, BundleCorrupt, Fault, Finding, InternalFault

log = structlog.get_logger()

MAX_KEPT: Final = 1000


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
            for old in paths[:-MAX_KEPT]:
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
