"""Sources whose listing has the digest of every file."""

import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, closing
from pathlib import Path
from typing import IO, ClassVar

from loramux_shared.bundle.manifest import FileDigest
from loramux_shared.deployment import Repository
from loramux_shared.faults import RepoNotFound
from loramux_shared.sources.base import Progress, Resolved, Room, unwatched
from loramux_shared.sources.cache import missing_files
from loramux_shared.sources.files import closed_with, disk_errors, inside
from loramux_shared.sources.https import Https
from loramux_shared.sources.retry import RetryPolicy
from loramux_shared.sources.secrets import Secrets


class ListedSource(ABC):
    """A source over https whose revision is a digest of all files."""

    cached_in: ClassVar[str]
    """Folder of the cache."""

    def __init__(
        self, https: Https, secrets: Secrets, work_dir: Path | None = None, patience: RetryPolicy | None = None
    ) -> None:
        self._https = https
        self._secrets = secrets
        self._work_dir = work_dir
        self._patience = patience or RetryPolicy()

    @abstractmethod
    def resolve(
        self, repository: Repository, progress: Progress = unwatched, room: Room = unwatched
    ) -> Resolved:
        """List a repository at its revision."""

    @abstractmethod
    def fetch(
        self, resolved: Resolved, names: Iterable[str], into: Path, progress: Progress = unwatched
    ) -> dict[str, FileDigest]:
        """Write files of the listing."""

    def digests(
        self,
        resolved: Resolved,
        names: Iterable[str],
        progress: Progress = unwatched,
        room: Room = unwatched,
    ) -> dict[str, FileDigest]:
        """Return what the listing found."""
        del room
        progress(0)
        files = {name: resolved.files[name] for name in names}
        return {name: FileDigest(size=file.size, sha256=file.sha256 or "") for name, file in files.items()}

    def pin(self, resolved: Resolved, files: Mapping[str, FileDigest]) -> Repository:
        """Return the repository at the digest that the listing found."""
        del files
        return resolved.repository

    def place(
        self,
        repository: Repository,
        files: Mapping[str, FileDigest],
        cache: Path,
        progress: Progress = unwatched,
        room: Room = unwatched,
    ) -> Path:
        """Fetch the files that the cache lacks."""
        parts = self.cached_in, repository.revision, repository.subfolder
        folder = inside(cache, "/".join(filter(None, parts)))
        if missing := missing_files(cache, folder, files):
            with closing(self.resolve(repository, progress, room)) as resolved:
                if gone := sorted(name for name in missing if name not in resolved.files):
                    name = f"{repository.source} {repository.label}"
                    raise RepoNotFound(f"{name}: {', '.join(gone[:3])} is not in it")
                room(resolved.size(missing))
                self.fetch(resolved, missing, folder, progress)
        return folder

    def _unnamed(self, opened: ExitStack) -> IO[bytes]:
        """Return a file without a name, which is gone when it is closed."""
        with disk_errors():
            if self._work_dir:
                self._work_dir.mkdir(parents=True, exist_ok=True)
            return closed_with(opened, tempfile.TemporaryFile(dir=self._work_dir))
