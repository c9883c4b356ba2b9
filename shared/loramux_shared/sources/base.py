"""The interface of every source of repositories."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol, TypeAlias

from loramux_shared.bundle.manifest import FileDigest, sha256_hex
from loramux_shared.deployment import Repository
from loramux_shared.faults import Fault, SourceRefused

Progress: TypeAlias = Callable[[int], None]
"""Told the bytes that came in since the last call, from any thread; what it raises ends the transfer."""

Room: TypeAlias = Callable[[int], None]
"""Asked for bytes before they are written to the disk; what it raises ends the transfer."""

MAX_BYTES: Final = 2 << 40
"""Largest repository: a larger listing is not believed; the largest open checkpoints have about 2e12 bytes."""
MAX_FILES: Final = 10_000
"""Most files of one repository: beyond it the address is that of something larger than a model."""


def unwatched(_: int) -> None:
    """A progress that ignores all reports."""


@dataclass(frozen=True)
class SourceFile:
    """A file of a repository, before it is fetched."""

    size: int
    sha256: str | None = None
    """Digest, where the source knows it without reading the file."""
    checksum: str = ""
    """Other checksum of the content from the source: ``md5:<hex>``, or ``git:<hex>`` of a blob of git's."""
    version: str = ""
    """The source's name of this state of the file (ETag, generation); no other state is fetched."""
    settled: bool = field(default=True, compare=False)
    """False where the file may change once more without getting another version."""

    @property
    def known(self) -> bool:
        """Return True if an equal description from the source means equal content."""
        return self.settled and bool(self.sha256 or self.checksum or self.version)


@dataclass(frozen=True)
class Resolved:
    """A repository whose content cannot change under us any more, or whose change will be noticed."""

    repository: Repository
    """Repository with the commit (HF), or the digest of archive (REMOTE_URL) or manifest (OCI); others are as
    they were requested."""
    files: Mapping[str, SourceFile]
    """Files by path inside the subfolder."""

    def close(self) -> None:
        """Let go of what the listing itself holds; nothing is fetched from it any more."""

    def size(self, names: Iterable[str]) -> int:
        """Return the bytes of these files together."""
        return sum(self.files[name].size for name in names)

    def digest(self, names: Iterable[str]) -> str | None:
        """Return the sha256 of what the source says of these files; None where it may say so of others too."""
        sizes = {name: self.files[name] for name in names}
        if not all(file.known for file in sizes.values()):
            return None
        table = {
            name: [file.size, file.sha256 or file.checksum or file.version] for name, file in sizes.items()
        }
        return sha256_hex(json.dumps(table, sort_keys=True, separators=(",", ":")).encode())


def bounded(resolved: Resolved, names: Iterable[str], what: str) -> list[str]:
    """Return names in their order, of files to be fetched from what is called so; raise SourceRefused for more
    than `MAX_BYTES` together.
    """
    ordered = sorted(names)
    if (size := resolved.size(ordered)) > MAX_BYTES:
        raise SourceRefused(f"{what}: {size} bytes, at most {MAX_BYTES}")
    return ordered


@contextmanager
def about(repository: Repository) -> Iterator[None]:
    """Note in what is raised by the block that this repository was being read."""
    try:
        yield
    except Fault as fault:
        fault.repository = repository.label
        raise


class Source(Protocol):
    """A kind of place where repositories are.

    Every method may block, and may be called from several threads at once. All raise `RepoNotFound`,
    `RepoGated`, `RevisionNotFound`, `SourceRefused`, `SourceChanged`, `SourceUnavailable`, `BundleCorrupt`
    where other bytes came than were listed, or `ResourcesExhausted` where the disk is full.
    """

    def resolve(
        self, repository: Repository, progress: Progress = unwatched, room: Room = unwatched
    ) -> Resolved:
        """List a repository at its revision; the caller closes the listing.

        Nothing is fetched, except an archive, whose listing is in it.
        """
        ...

    def fetch(
        self, resolved: Resolved, names: Iterable[str], into: Path, progress: Progress = unwatched
    ) -> dict[str, FileDigest]:
        """Write files of the listing to ``into/<name>``, and return what they are."""
        ...

    def digests(
        self, resolved: Resolved, names: Iterable[str], progress: Progress = unwatched, room: Room = unwatched
    ) -> dict[str, FileDigest]:
        """Return what files of the listing are, and transfer only those of unknown digest."""
        ...

    def pin(self, resolved: Resolved, files: Mapping[str, FileDigest]) -> Repository:
        """Return the repository with its final revision, from the files that are used of it."""
        ...

    def place(
        self,
        repository: Repository,
        files: Mapping[str, FileDigest],
        cache: Path,
        progress: Progress = unwatched,
        room: Room = unwatched,
    ) -> Path:
        """Return a folder that holds these files, fetched below cache where it must be; not yet verified."""
        ...
