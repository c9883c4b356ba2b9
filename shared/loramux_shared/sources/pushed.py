"""PUSHED: adapters that were sent to a builder; the bundle that was made of them is all that is left."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NoReturn

from loramux_shared.bundle.manifest import FileDigest
from loramux_shared.deployment import Repository
from loramux_shared.faults import RepoNotFound
from loramux_shared.sources.base import Progress, Resolved, Room, unwatched


class PushedSource:
    """Has nothing: an adapter that was pushed stays as long as its bundle is kept, and is pushed again then."""

    def resolve(
        self, repository: Repository, progress: Progress = unwatched, room: Room = unwatched
    ) -> Resolved:
        """Say that there is nothing to list."""
        del progress, room
        _gone(repository)

    def fetch(
        self, resolved: Resolved, names: Iterable[str], into: Path, progress: Progress = unwatched
    ) -> dict[str, FileDigest]:
        """Say that there is nothing to fetch."""
        del names, into, progress
        _gone(resolved.repository)

    def digests(
        self,
        resolved: Resolved,
        names: Iterable[str],
        progress: Progress = unwatched,
        room: Room = unwatched,
    ) -> dict[str, FileDigest]:
        """Say that there is nothing to read."""
        del names, progress, room
        _gone(resolved.repository)

    def pin(self, resolved: Resolved, files: Mapping[str, FileDigest]) -> Repository:
        """Return the repository, which has its revision from the push."""
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
        """Say that there is nothing to place."""
        del files, cache, progress, room
        _gone(repository)


def _gone(repository: Repository) -> NoReturn:
    at = f" at {repository.revision}" if repository.revision else ""
    raise RepoNotFound(
        f"PUSHED {repository.label}{at}: its files are not stored, and the served generation has no complete "
        "bundle of it for this base and these settings. Push it again."
    )
