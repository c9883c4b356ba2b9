"""REMOTE_URL: archives (tar.gz) behind an https address."""

import hashlib
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

from loramux_shared.bundle.manifest import FileDigest
from loramux_shared.deployment import Repository
from loramux_shared.faults import RepoNotFound, RevisionNotFound, SourceRefused
from loramux_shared.sources.archive import Archive, inner_files
from loramux_shared.sources.base import Progress, Resolved, Room, unwatched
from loramux_shared.sources.entries import SourceSettings
from loramux_shared.sources.fields import fields_of
from loramux_shared.sources.files import disk_errors, hash_pieces, inside, whole
from loramux_shared.sources.https import Https
from loramux_shared.sources.listed import ListedSource
from loramux_shared.sources.public import AddressGuard
from loramux_shared.sources.retry import TimeLeft
from loramux_shared.sources.secrets import warn_unset

MAX_ARCHIVE: Final = 64 << 30
"""Largest download, which is kept on the disk: larger bases belong in a bucket or on a hub."""


@dataclass(frozen=True)
class ResolvedArchive(Resolved):
    """A downloaded archive; its file has no name, and is gone when it is closed."""

    archive: Archive
    inner: Mapping[str, str]
    """Names in the archive by names in the subfolder."""

    def close(self) -> None:
        """Close the archive, which frees its space."""
        self.archive.file.close()


class UrlSource(ListedSource):
    """Downloads an archive once, into a file without a name, and reads everything from that."""

    cached_in = "archive"

    def resolve(
        self, repository: Repository, progress: Progress = unwatched, room: Room = unwatched
    ) -> ResolvedArchive:
        """Download the archive, and list it; the revision is its sha256."""
        with ExitStack() as opened, disk_errors():
            file = self._unnamed(opened)
            resolved = self._listed(repository, file, progress, room)
            opened.pop_all()
        return resolved

    def fetch(
        self, resolved: Resolved, names: Iterable[str], into: Path, progress: Progress = unwatched
    ) -> dict[str, FileDigest]:
        """Write files of the archive."""
        archive = _archive(resolved)
        inner = {archive.inner[name]: name for name in names}
        fetched = {}
        for name, pieces in archive.archive.read(inner, progress):
            with whole(inside(into, name)) as sink:
                fetched[name] = hash_pieces(pieces, progress, sink)
        return fetched

    def _listed(
        self, repository: Repository, file: IO[bytes], progress: Progress, room: Room
    ) -> ResolvedArchive:
        name = f"REMOTE_URL {repository.label}"
        digest = self._download(repository, file, progress, room)
        if repository.revision and repository.revision != digest.sha256:
            raise RevisionNotFound(
                f"{name}: expected an archive of sha256 {repository.revision}, found {digest.sha256}. "
                "Leave revision out to take what is there."
            )
        archive = Archive(file, name, digest.size)
        files = archive.listing(progress)
        inner = inner_files(files, repository.subfolder)
        if not inner:
            where = f"no folder {repository.subfolder!r}" if repository.subfolder else "no file"
            raise RepoNotFound(f"{name}: {where} in the archive")
        return ResolvedArchive(
            repository.model_copy(update={"revision": digest.sha256}),
            {short: files[long] for short, long in inner.items()},
            archive,
            inner,
        )

    def _download(self, repository: Repository, file: IO[bytes], progress: Progress, room: Room) -> FileDigest:
        name = f"REMOTE_URL {repository.label}"
        authorization = self._authorization(repository)
        taken = 0

        def take(size: int) -> None:
            """Ask for room for an archive of at least this size."""
            nonlocal taken
            if size > MAX_ARCHIVE:
                raise SourceRefused(f"{name}: {size} bytes, and an archive has at most {MAX_ARCHIVE}")
            if size > taken:
                room(size - taken)
                taken = size

        def attempt(deadline: TimeLeft) -> FileDigest:
            watch = deadline.watch(name, progress)
            file.seek(0)
            file.truncate()
            digest, size = hashlib.sha256(), 0
            with self._https.get(repository.repo, deadline, authorization) as download:
                take(download.size or 0)
                for piece in download.pieces():
                    size += len(piece)
                    take(size)
                    watch(len(piece))
                    digest.update(piece)
                    with disk_errors():
                        file.write(piece)
            with disk_errors():
                file.flush()
            return FileDigest(size=size, sha256=digest.hexdigest())

        return self._patience.call(attempt, progress)

    def _authorization(self, repository: Repository) -> tuple[str, str] | None:
        """Return a host and the header for it alone: the author of a deployment chooses the address."""
        name = repository.runtime_secret_name
        secret = fields_of(self._secrets, name, ("host", "authorization"))
        if name and not secret:
            warn_unset(repository)
        return (secret["host"].lower(), secret["authorization"]) if secret else None


def _archive(resolved: Resolved) -> ResolvedArchive:
    if not isinstance(resolved, ResolvedArchive):
        raise TypeError(f"expected what resolve returned, found {type(resolved).__name__}")
    return resolved


def open_source(settings: SourceSettings) -> UrlSource:
    """Return the source."""
    return UrlSource(Https(AddressGuard(settings.allowed_hosts)), settings.secrets, settings.work_dir)
