"""S3, GCS and AZURE: folders of object stores, which differ in their clients and nothing else."""

import base64
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import IO, Final, Protocol, TypeAlias

from loramux_shared.bundle.manifest import FileDigest
from loramux_shared.deployment import Repository
from loramux_shared.faults import BundleCorrupt, RepoNotFound, SourceRefused, SourceUnavailable
from loramux_shared.sources.base import MAX_FILES, Progress, Resolved, Room, SourceFile, bounded, unwatched
from loramux_shared.sources.cache import missing_files
from loramux_shared.sources.files import Checksum, exactly, hash_pieces, inside, is_text, pin_content, whole
from loramux_shared.sources.retry import RetryPolicy, TimeLeft
from loramux_shared.sources.secrets import Secrets

TIMEOUT_S: Final = 20.0
"""Timeout of a connection, and between two pieces."""


def md5_of(value: str | bytearray | None) -> str:
    """Return the checksum of a listing that gives an MD5, in base64 or as bytes; else nothing."""
    digest = base64.b64decode(value) if isinstance(value, str) else value or b""
    return f"md5:{digest.hex()}" if digest else ""


class Bucket(Protocol):
    """A client of one bucket or container; raises the failures of `Source`, and does not try again."""

    def list(self, prefix: str) -> Iterator[tuple[str, SourceFile]]:
        """Yield the objects whose names begin with prefix, with the versions that they have now."""
        ...

    def read(self, key: str, version: str) -> Iterator[bytes]:
        """Yield an object's bytes as they are stored, or raise `SourceChanged` where it has another version."""
        ...

    def close(self) -> None:
        """Close the client's connections."""
        ...


Opener: TypeAlias = Callable[[Repository, Secrets], tuple[Bucket, str]]
"""Returns the client of a repository's bucket, and the repository's folder in it."""


class BucketSource:
    """Lists a folder with the version of every object, and reads no other version of them."""

    def __init__(self, opener: Opener, secrets: Secrets, patience: RetryPolicy | None = None) -> None:
        self._opener = opener
        self._secrets = secrets
        self._patience = patience or RetryPolicy()

    def resolve(
        self, repository: Repository, progress: Progress = unwatched, room: Room = unwatched
    ) -> Resolved:
        """List a folder; the revision follows from the content, and is known once the files were read."""
        del room
        name = _name(repository)

        def attempt(deadline: TimeLeft) -> dict[str, SourceFile]:
            watch = deadline.watch(name, progress)
            files: dict[str, SourceFile] = {}
            for key, file in bucket.list(prefix):
                watch(0)
                if len(files) == MAX_FILES:
                    raise SourceRefused(f"{name}: more than {MAX_FILES} files; name a folder in it")
                if not key.endswith("/") and is_text(key):  # consoles mark folders so
                    files[key.removeprefix(prefix)] = file
            return files

        with self._opened(repository) as (bucket, prefix):
            files = self._patience.call(attempt, progress)
        if not files:
            raise RepoNotFound(f"{name}: no objects found. {_hint(repository, self._secrets)}")
        return Resolved(repository, files)

    def fetch(
        self, resolved: Resolved, names: Iterable[str], into: Path, progress: Progress = unwatched
    ) -> dict[str, FileDigest]:
        """Download the listed versions of files, and hash what arrived."""
        names = bounded(resolved, names, _name(resolved.repository))
        fetched = {}
        with self._opened(resolved.repository) as (bucket, prefix):
            for name in names:
                with whole(inside(into, name)) as sink:
                    fetched[name] = self._read(bucket, prefix + name, resolved, name, progress, sink)
        return fetched

    def digests(
        self,
        resolved: Resolved,
        names: Iterable[str],
        progress: Progress = unwatched,
        room: Room = unwatched,
    ) -> dict[str, FileDigest]:
        """Read the listed versions of files, and keep only their digests."""
        del room
        with self._opened(resolved.repository) as (bucket, prefix):
            return {name: self._read(bucket, prefix + name, resolved, name, progress) for name in sorted(names)}

    def pin(self, resolved: Resolved, files: Mapping[str, FileDigest]) -> Repository:
        """Return the repository with the digest of its files as revision."""
        return pin_content(resolved.repository, files)

    def place(
        self,
        repository: Repository,
        files: Mapping[str, FileDigest],
        cache: Path,
        progress: Progress = unwatched,
        room: Room = unwatched,
    ) -> Path:
        """Download the files that the cache lacks, as they are now.

        The caller that verifies them sees any change.
        """
        folder = inside(cache, f"{repository.source.lower()}/{repository.revision}")
        if missing := missing_files(cache, folder, files):
            resolved = self.resolve(repository, progress)
            if gone := sorted(name for name in missing if name not in resolved.files):
                raise RepoNotFound(f"{_name(repository)}: {', '.join(gone[:3])} was removed. Restore it.")
            room(resolved.size(missing))
            self.fetch(resolved, missing, folder, progress)
        return folder

    @contextmanager
    def _opened(self, repository: Repository) -> Iterator[tuple[Bucket, str]]:
        bucket, folder = self._opener(repository, self._secrets)
        path = "/".join(part for part in (folder.strip("/"), repository.subfolder) if part)
        with closing(bucket):
            yield bucket, f"{path}/" if path else ""

    def _read(
        self,
        bucket: Bucket,
        key: str,
        resolved: Resolved,
        name: str,
        progress: Progress,
        sink: IO[bytes] | None = None,
    ) -> FileDigest:
        file, label = resolved.files[name], f"{_name(resolved.repository)}: {name}"
        problems: list[str] = []

        def attempt(deadline: TimeLeft) -> FileDigest:
            watch = deadline.watch(label, progress)
            if sink is not None:
                sink.seek(0)
                sink.truncate()
            check = Checksum(file)
            pieces = exactly(bucket.read(key, file.version), file.size, label)
            found = hash_pieces(check.of(pieces), watch, sink)
            if problem := check.problem(found):
                problems.append(problem)
                kind = SourceUnavailable if len(problems) == 1 else BundleCorrupt
                raise kind(
                    f"{label}: the content differs from the listing: {problem}. Build or upload it again."
                )
            return found

        return self._patience.call(attempt, progress)


def _name(repository: Repository) -> str:
    return f"{repository.source} {repository.label}"


def _hint(repository: Repository, secrets: Secrets) -> str:
    if repository.subfolder:
        return f"Correct the address or subfolder {repository.subfolder!r}."
    return f"Correct the address. {secrets.hint(repository.runtime_secret_name)}"
